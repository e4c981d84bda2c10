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
    if name == LANGUAGE:
        for field, what in (
            ("vocab_size", "words it knows"),
            ("seq_length", "tokens a sample has"),
        ):
            if getattr(sizes, field) is None:
                yield Problem(f"{name} has no {field}; write how many {what}", (name, field))
        if sizes.packed_lengths and sum(sizes.packed_lengths) > sizes.sequence:
            yield Problem(
                f"{name} packs {sum(sizes.packed_lengths)} tokens into rows of seq_length "
                f"{sizes.sequence}; leave out some of packed_lengths, or raise seq_length",
                (name, "packed_lengths"),
            )
    else:
        yield from _of_encoder(name, sizes)
    if sizes.num_attention_heads % sizes.num_query_groups:
        yield Problem(
            f"{name} has {sizes.num_attention_heads} attention heads, which "
            f"{sizes.num_query_groups} query groups do not divide; change one of the two",
            (name, "num_query_groups"),
        )
    experts = sizes.num_moe_experts
    if experts is not None and sizes.moe_router_topk > experts:
        yield Problem(
            f"{name} sends each token to {sizes.moe_router_topk} of {experts} experts; lower "
            f"moe_router_topk",
            (name, "moe_router_topk"),
        )
    pattern = sizes.moe_layer_freq
    if not isinstance(pattern, int) and len(pattern) != sizes.num_layers:
        yield Problem(
            f"moe_layer_freq lists {len(pattern)} layers, but {name} has {sizes.num_layers}; list "
            f"each layer",
            (name, "moe_layer_freq"),
        )
    if sizes.recompute_granularity == "full" and sizes.recompute_method is None:
        yield Problem(
            f'{name} recomputes whole layers; write recompute_method = "uniform" or "block"',
            (name, "recompute_granularity"),
        )


def _of_encoder(name: str, sizes: ModuleSizes) -> Iterator[Problem]:
    if sizes.vocab_size is not None:
        yield Problem(
            f"{name} has a vocabulary, but only the language model reads words; leave it out, or "
            f"call the module {LANGUAGE}",
            (name, "vocab_size"),
        )
    elif sizes.tokens_per_image is None:
        yield Problem(
            f"{name} has no tokens_per_image; write how many tokens an image has inside it",
            (name, "tokens_per_image"),
        )
    elif sizes.tokens_per_image % sizes.output_tokens:
        yield Problem(
            f"{name} makes {sizes.output_tokens} tokens out of {sizes.tokens_per_image}, not a "
            f"whole number of each; choose output_tokens_per_image so that it divides "
            f"tokens_per_image",
            (name, "output_tokens_per_image"),
        )


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
