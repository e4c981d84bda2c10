"""The factor by which each module's gradient becomes the gradient of the one loss."""


def gradient_scaling_factor(
    replicas: int, language_replicas: int, *, ddp_sums: bool, per_token: bool
) -> float:
    """Factor from what DDP delivers for a module to the gradient of the one loss.

    DDP delivers the sum over the module's R_m replicas if ``ddp_sums``, else the mean. The loss is
    the mean over the language model's replicas, or, if ``per_token``, the sum over all unmasked
    tokens divided by their number N. Hence

        c_m = (1 if ddp_sums else R_m) x (1/N if per_token else 1/R_language)

    Returns:
        c_m, without the 1/N that only each step knows.

    Example:
        Both average: encoder DP / language DP.

        >>> gradient_scaling_factor(4, 2, ddp_sums=False, per_token=False)
        2.0
    """
    return (1.0 if ddp_sums else float(replicas)) / (1 if per_token else language_replicas)
