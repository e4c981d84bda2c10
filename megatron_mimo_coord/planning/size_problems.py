"""What keeps a module's sizes from fitting together, or from being divided among ranks."""

from collections.abc import Iterator

from megatron_mimo_coord.layout import LANGUAGE, ModuleParallelism
from megatron_mimo_coord.layout.problems import Problem
from megatron_mimo_coord.planning.module_sizes import ModuleSizes


def size_problems(name: str, sizes: ModuleSizes) -> Iterator[Problem]:
    """What does not fit together in a module.

    Example:
        >>> encoder = ModuleSizes(num_layers=2, hidden_size=64, num_attention_heads=4)
        >>> print(*size_problems("vision", encoder))
        vision has no tokens_per_image; write how many tokens an image has inside it
    """
    for field, said in _misfits(name, sizes):
        yield Problem(f"{name} {said}", (name, field))


def _misfits(name: str, sizes: ModuleSizes) -> Iterator[tuple[str, str]]:
    """Fields, and what the module does wrong there."""
    inside, outside = sizes.tokens_per_image, sizes.output_tokens
    packed, pattern = sum(sizes.packed_lengths or ()), sizes.moe_layer_freq
    heads, groups = sizes.num_attention_heads, sizes.num_query_groups
    experts, topk = sizes.num_moe_experts, sizes.moe_router_topk
    if name == LANGUAGE:
        if sizes.vocab_size is None:
            yield "vocab_size", "has no vocab_size; write how many words it knows"
        if sizes.seq_length is None:
            yield "seq_length", "has no seq_length; write how many tokens a sample has"
        elif packed > sizes.seq_length:
            yield (
                "packed_lengths",
                f"packs {packed} tokens into rows of seq_length {sizes.seq_length}; leave out some "
                f"of packed_lengths, or raise seq_length",
            )
    elif sizes.vocab_size is not None:
        yield (
            "vocab_size",
            f"has a vocabulary, but only the language model reads words; leave it out, or call the "
            f"module {LANGUAGE}",
        )
    elif inside is None:
        said = "has no tokens_per_image; write how many tokens an image has inside it"
        yield "tokens_per_image", said
    elif inside % outside:
        yield (
            "output_tokens_per_image",
            f"makes {outside} tokens out of {inside}, not a whole number of each; choose "
            f"output_tokens_per_image so that it divides tokens_per_image",
        )
    if heads % groups:
        yield (
            "num_query_groups",
            f"has {heads} attention heads, which {groups} query groups do not divide; change one "
            f"of the two",
        )
    if experts is not None and topk > experts:
        said = f"sends each token to {topk} of {experts} experts; lower moe_router_topk"
        yield "moe_router_topk", said
    if not isinstance(pattern, int) and len(pattern) != sizes.num_layers:
        yield (
            "moe_layer_freq",
            f"has {sizes.num_layers} layers, but moe_layer_freq lists {len(pattern)}; list each "
            f"layer",
        )
    if sizes.recompute_granularity == "full" and sizes.recompute_method is None:
        said = 'recomputes whole layers; write recompute_method = "uniform" or "block"'
        yield "recompute_granularity", said


def sharding_problems(
    name: str, sizes: ModuleSizes, parallelism: ModuleParallelism
) -> Iterator[Problem]:
    """What keeps ranks from sharing a module equally, as Megatron does.

    Example:
        >>> sizes = ModuleSizes(num_layers=2, hidden_size=96, num_attention_heads=6)
        >>> layout = ModuleParallelism(tensor_model_parallel_size=4)
        >>> print(*sharding_problems("vision", sizes, layout), sep="\\n")
        vision has num_attention_heads 6, which tensor_model_parallel_size 4 does not divide
        vision has num_query_groups 6, of which tensor_model_parallel_size 4 is neither a divisor \
nor a multiple
    """
    try:
        parallelism.layers_of_stages(sizes.num_layers)
    except ValueError as error:
        pp = "pipeline_model_parallel_size"
        yield Problem(f"{name} has num_layers {error}", (name, pp))
    tp = "tensor_model_parallel_size"
    expert_tp, ep = "expert_tensor_parallel_size", "expert_model_parallel_size"
    has_mlp = not all(map(sizes.has_experts, range(sizes.num_layers)))
    has_experts = sizes.num_moe_experts is not None
    tokens = "seq_length" if sizes.is_language else "tokens_per_image"
    cp, shards = parallelism.context_parallel_size, parallelism.tensor_model_parallel_size
    if cp > 1 and sizes.is_language:
        parts = 2 * cp * (shards if sizes.sequence_parallel else 1)
        what = f"2 x CP{' x TP' if sizes.sequence_parallel else ''} = {parts}"
        if sizes.sequence % parts:
            message = f"{name} has seq_length {sizes.sequence}, which {what} does not divide"
            yield Problem(message, (name, "context_parallel_size"))
        if any(length % (2 * cp) for length in sizes.packed_lengths or ()):
            message = f"{name} has packed_lengths that 2 x CP = {2 * cp} does not divide"
            yield Problem(message, (name, "context_parallel_size"))
    shared = sizes.moe_shared_expert_intermediate_size
    for what, number, field in (
        ("num_attention_heads", sizes.num_attention_heads, tp),
        ("queries, keys and values of width", sizes.query_size + 2 * sizes.key_size, tp),
        ("ffn_hidden_size", has_mlp and sizes.ffn_hidden_size, tp),
        ("vocab_size", sizes.vocab_size, tp),
        (tokens, sizes.sequence_parallel and sizes.sequence, tp),
        ("num_moe_experts", sizes.num_moe_experts, ep),
        ("moe_ffn_hidden_size", has_experts and sizes.moe_ffn_hidden_size, expert_tp),
        ("moe_shared_expert_intermediate_size", has_experts and shared, tp),
    ):
        ranks = getattr(parallelism, field)
        if number and number % ranks:
            message = f"{name} has {what} {number}, which {field} {ranks} does not divide"
            yield Problem(message, (name, field))
    groups, ranks = sizes.num_query_groups, parallelism.tensor_model_parallel_size
    if groups % ranks and ranks % groups:
        yield Problem(
            f"{name} has num_query_groups {groups}, of which {tp} {ranks} is neither a divisor nor "
            f"a multiple",
            (name, tp),
        )
    if has_experts and ranks > 1 and not sizes.sequence_parallel:
        yield Problem(
            f"{name} has experts and {tp} {ranks}, with which Megatron wants sequence_parallel",
            (name, tp),
        )
