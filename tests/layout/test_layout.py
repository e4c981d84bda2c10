"""The arithmetic on ranks and sizes."""

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_mimo_coord import ModuleParallelism
from megatron_mimo_coord.layout import (
    DIM_NAMES,
    LANGUAGE,
    ModuleGrid,
    default_topology,
    gradient_scaling_factor,
    is_colocated,
    pack,
)
from megatron_mimo_coord.layout.batch import batch_problems, data_parallel_slice
from megatron_mimo_coord.layout.description import describe, summarize
from megatron_mimo_coord.layout.problems import coverage_problems, layout_problems, raise_problems

sizes = st.integers(1, 4)
shapes = st.tuples(sizes, sizes, sizes, sizes)
grids = st.builds(
    ModuleGrid,
    name=st.just("vision"),
    shape=shapes,
    dim_names=st.permutations(DIM_NAMES),
    rank_offset=st.integers(0, 50),
)
modules = st.builds(
    ModuleParallelism,
    tensor_model_parallel_size=sizes,
    context_parallel_size=st.integers(1, 2),
    pipeline_model_parallel_size=sizes,
    data_parallel_size=sizes,
    rank_offset=st.none() | st.integers(0, 20),
)
layouts = st.dictionaries(st.sampled_from(["vision", "audio", LANGUAGE]), modules, min_size=1)


@given(grids)
def test_a_rank_is_where_its_coordinates_say(grid):
    for rank in grid.ranks:
        coordinates = {dim: grid.coordinate(rank, dim) for dim in DIM_NAMES}
        assert grid.rank_at(**coordinates) == rank
        assert all(0 <= index < grid.dim(dim) for dim, index in coordinates.items())


@given(grids)
def test_membership_is_that_of_hyper_comm_grid(grid):
    from megatron.core.hyper_comm_grid import HyperCommGrid

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1000")
        theirs = HyperCommGrid(list(grid.shape), list(grid.dim_names), grid.rank_offset)
    assert ModuleGrid.of("vision", theirs) == grid
    for dim in DIM_NAMES:
        for group in theirs.get_rank_enum(dim):
            assert [grid.coordinate(rank, dim) for rank in group] == list(range(grid.dim(dim)))
    everyone = sorted(rank for group in theirs.get_rank_enum("tp") for rank in group)
    assert everyone == list(grid.ranks)


@given(st.lists(modules.map(lambda module: (module, None)), min_size=1, max_size=5))
def test_packed_modules_tile_the_ranks(drawn):
    packed = pack(
        {
            f"module{index}": ModuleParallelism(
                tensor_model_parallel_size=module.tensor_model_parallel_size,
                data_parallel_size=module.data_parallel_size,
            )
            for index, (module, _) in enumerate(drawn)
        }
    )
    ranks = [rank for grid in packed.values() for rank in grid.ranks]
    assert ranks == list(range(len(ranks)))
    assert not coverage_problems({n: grid.ranks for n, grid in packed.items()}, len(ranks))


@given(grids, st.integers(1, 5))
def test_slices_partition_the_microbatch(grid, samples_per_rank):
    micro_batch_size = grid.data_parallel_size * samples_per_rank
    readers = dict.fromkeys(range(micro_batch_size), 0)
    for rank in grid.ranks:
        samples = data_parallel_slice(micro_batch_size, grid, rank)
        assert samples.stop - samples.start == samples_per_rank
        for sample in range(samples.start, samples.stop):
            readers[sample] += 1
    assert set(readers.values()) == {grid.size // grid.data_parallel_size}


@given(grids, st.integers(1, 30))
def test_a_microbatch_that_does_not_divide_is_refused(grid, micro_batch_size):
    assume(micro_batch_size % grid.data_parallel_size)
    with pytest.raises(ValueError, match=f"not divisible by the DP {grid.data_parallel_size}"):
        data_parallel_slice(micro_batch_size, grid, grid.rank_offset)


def test_a_rank_elsewhere_reads_nothing():
    grid = ModuleGrid("vision", (1, 1, 2, 1), DIM_NAMES, rank_offset=4)
    with pytest.raises(ValueError, match=r"rank 3 is not in module vision \(ranks 4-5"):
        data_parallel_slice(2, grid, 3)


@given(sizes, sizes, st.booleans(), st.booleans(), st.integers(1, 1000))
def test_factors_make_ddp_deliver_the_gradient_of_the_loss(replicas, language, sums, per_token, n):
    # A gradient of 1 from every replica: DDP delivers the sum or the mean, the loss wants sum/N or
    # sum/R_language.
    delivered = Fraction(replicas) if sums else Fraction(1)
    wanted = Fraction(replicas) / (n if per_token else language)
    factor = gradient_scaling_factor(replicas, language, ddp_sums=sums, per_token=per_token)
    got = delivered * Fraction(factor).limit_denominator(64) / (n if per_token else 1)
    assert got == wanted


def test_the_factor_is_encoder_dp_over_language_dp_when_both_average():
    assert gradient_scaling_factor(4, 2, ddp_sums=False, per_token=False) == 2.0


def runs(layout, topology, world_size):
    """By definition, rank by rank, whether a layout runs."""
    placed = {name: set(grid.ranks) for name, grid in layout.items()}
    if LANGUAGE not in layout or set().union(*placed.values()) != set(range(world_size)):
        return False
    encoders = [name for name in layout if name != LANGUAGE]
    sharing = [name for name in encoders if placed[name] & placed[LANGUAGE]]
    if sharing and any(not placed[name] <= placed[LANGUAGE] for name in encoders):
        return False
    if any(layout[name].dim("pp") > 1 for name in sharing):
        return False
    for left in encoders if not sharing else ():
        for right in encoders:
            if placed[left] != placed[right] and placed[left] & placed[right]:
                return False
            if placed[left] == placed[right] and layout[left].dim("pp") != layout[right].dim("pp"):
                return False
    for name in encoders:
        dp, language_dp = layout[name].dim("dp"), layout[LANGUAGE].dim("dp")
        if dp % language_dp and language_dp % dp:
            return False
        if layout[name].dim("cp") > 1:
            return False
    return True


@given(layouts, st.integers(-1, 1))
def test_exactly_the_layouts_that_run_are_accepted(drawn, difference):
    layout = pack(drawn)
    world_size = max(1, max(grid.ranks.stop for grid in layout.values()) + difference)
    topology = default_topology(layout)
    problems = layout_problems(layout, topology, world_size)
    assert (not problems) == runs(layout, topology, world_size), problems
    assert all(len(problem) > 40 for problem in problems)


@pytest.mark.parametrize(
    ("drawn", "world_size", "message"),
    [
        ({"vision": {}}, 1, "no module named 'language' (modules: vision)"),
        ({"language": {}}, 2, "rank 1 of 2 is in no module"),
        ({"language": {"rank_offset": 1}}, 2, "rank 0 of 2 is in no module"),
        ({"language": {"data_parallel_size": 4}}, 2, "but the world has 2 ranks (0-1)"),
        (
            {"vision": {"data_parallel_size": 2}, "language": {"rank_offset": 1}},
            2,
            "overlap in part",
        ),
        (
            {"vision": {"data_parallel_size": 2}, "language": {"data_parallel_size": 3}},
            5,
            "vision has DP 2 and language has DP 3: neither divides the other",
        ),
        (
            {"vision": {"context_parallel_size": 2}, "language": {}},
            3,
            "an encoder's CP must be 1: set its context_parallel_size to 1",
        ),
        (
            {
                "vision": {"pipeline_model_parallel_size": 2},
                "language": {"pipeline_model_parallel_size": 2, "rank_offset": 0},
            },
            2,
            "Megatron runs colocated modules without a pipeline",
        ),
    ],
)
def test_what_is_wrong_is_said(drawn, world_size, message):
    layout = pack({name: ModuleParallelism(**sizes) for name, sizes in drawn.items()})
    with pytest.raises(ValueError) as error:
        raise_problems("no", layout_problems(layout, default_topology(layout), world_size))
    assert message in str(error.value)


def test_a_topology_that_mimo_cannot_run_is_refused():
    layout = pack({"vision": ModuleParallelism(), "language": ModuleParallelism()})
    problems = layout_problems(layout, {"vision": [], "language": ["vision"]}, 2)
    assert any("topology sends vision to nothing" in problem for problem in problems)
    assert any("topology sends language to ['vision']" in problem for problem in problems)


@given(st.lists(grids, min_size=1, max_size=3), *[st.integers(-2, 40)] * 3)
def test_exactly_the_batches_that_can_be_dealt_out_are_accepted(some, total, micro, number):
    problems = batch_problems(some, total, micro, number)
    dps = [grid.data_parallel_size for grid in some]
    assert (not problems) == (
        min(total, micro, number) > 0
        and total == micro * number
        and all(micro % dp == 0 and total % dp == 0 for dp in dps)
    )


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2", None])
def test_sizes_are_positive_integers(bad):
    with pytest.raises(ValueError, match="data_parallel_size must be a positive integer below"):
        ModuleParallelism(data_parallel_size=bad)


@pytest.mark.parametrize("bad", [-1, 0.5, True, "2"])
def test_offsets_are_ranks(bad):
    with pytest.raises(ValueError, match="rank_offset must be a rank"):
        ModuleParallelism(rank_offset=bad)


@given(sizes, sizes, sizes, sizes)
def test_experts_share_the_ranks_of_a_stage(tp, dp, expert_tp, ep):
    def build():
        return ModuleParallelism(
            tensor_model_parallel_size=tp,
            data_parallel_size=dp,
            expert_tensor_parallel_size=expert_tp,
            expert_model_parallel_size=ep,
        )

    if tp * dp % (expert_tp * ep):
        with pytest.raises(ValueError, match=f"does not divide the {tp * dp} ranks"):
            build()
    else:
        assert build().expert_shape == (expert_tp, ep, tp * dp // (expert_tp * ep), 1)


def test_experts_are_split_like_the_rest_unless_said():
    assert ModuleParallelism(tensor_model_parallel_size=2).expert_tensor_parallel_size == 2


def test_describe_shows_ranks_sizes_samples_and_factors():
    layout = pack(
        {
            "vision": ModuleParallelism(data_parallel_size=4),
            "language": ModuleParallelism(tensor_model_parallel_size=2, data_parallel_size=2),
        }
    )
    text = describe(
        summarize(layout, {"vision": 2.0, "language": 1.0}, per_token=False, micro_batch_size=32)
    )
    vision, language = (line.split() for line in text.splitlines()[2:])
    assert vision == ["vision", "0-3", "1", "1", "1", "4", "8", "2", "fan-in", "4:2"]
    assert language == ["language", "4-7", "2", "1", "1", "2", "16", "1"]
    ones = {"vision": 1.0, "language": 1.0}
    assert "1/tokens" in describe(summarize(layout, ones, per_token=True))


def test_colocated_means_the_same_ranks():
    vision, language = ModuleParallelism(rank_offset=0), ModuleParallelism(rank_offset=0)
    assert is_colocated(pack({"vision": vision, "language": language}).values())
    assert not is_colocated(pack({"vision": vision, "language": ModuleParallelism()}).values())


def test_importing_the_arithmetic_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_mimo_coord.layout; "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron')])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout.strip() == "[]"


def test_checking_a_layout_does_not_look_at_single_ranks():
    """Counted, not timed: the same number of steps of Python for 10 and for 1,000,000 ranks."""

    def steps(ranks: int) -> int:
        layout = pack(
            {
                "vision": ModuleParallelism(data_parallel_size=ranks),
                "language": ModuleParallelism(data_parallel_size=ranks),
            }
        )
        lines = 0

        def count(frame, event, arg):
            nonlocal lines
            lines += 1
            return count

        sys.settrace(count)
        try:
            assert not layout_problems(layout, default_topology(layout), 2 * ranks)
            assert coverage_problems({n: g.ranks for n, g in layout.items()}, 2 * ranks + 1)
        finally:
            sys.settrace(None)
        return lines

    steps(10)  # what is done once a process
    assert steps(10) == steps(500_000)
