"""What a layout holds: microbatches in flight, messages, modules that share ranks."""

from layouts import parallel

from megatron_mimo_coord.layout import LANGUAGE, pack
from megatron_mimo_coord.planning.activations import stage_activations
from megatron_mimo_coord.planning.memory import StageMemory, layout_memory, rank_totals
from megatron_mimo_coord.planning.module_sizes import ModuleSizes

VISION = ModuleSizes(
    num_layers=4, hidden_size=32, num_attention_heads=4, tokens_per_image=8, patch_size=12
)
WORDS = ModuleSizes(
    num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=128, seq_length=32
)
SIZES = {"vision": VISION, LANGUAGE: WORDS}
STEP = {"micro_batch_size": 4, "num_microbatches": 5}


def test_a_stage_holds_what_comes_before_its_first_backward():
    layout = {"vision": parallel(pp=2, dp=2), LANGUAGE: parallel(pp=4, dp=4)}
    memory = layout_memory(layout, SIZES, **STEP)
    assert [held.microbatches for held in memory.values()] == [5, 5, 4, 3, 2, 1]
    first = memory[LANGUAGE, 0]
    received, sent = 8 * 64 * 4, 32 * 64 * 4  # tokens x hidden x bytes of a sample
    assert first.messages == 4 * (received + sent)
    assert memory[LANGUAGE, 3].messages == 0
    assert memory["vision", 1].messages == 5 * 2 * received


def test_all_that_is_held_counts():
    assert StageMemory(1, 2, 4, 8, 16, 32, microbatches=100).total == 63


def test_activations_are_those_of_all_microbatches_in_flight():
    memory = layout_memory({LANGUAGE: parallel(pp=4)}, {LANGUAGE: WORDS}, **STEP)
    one = stage_activations(WORDS, parallel(pp=4), 1, samples=4)[0]
    assert [memory[LANGUAGE, stage].activations for stage in (1, 2)] == [3 * one, 2 * one]


def test_modules_on_the_same_ranks_share_their_memory():
    layout = {"vision": parallel(dp=4, rank_offset=0), LANGUAGE: parallel(4, rank_offset=0)}
    memory = layout_memory(layout, SIZES, **STEP)
    together = sum(held.total for held in memory.values())
    assert rank_totals(pack(layout), memory) == dict.fromkeys(memory, together)
    assert {held.microbatches for held in memory.values()} == {1}


def test_a_frozen_encoder_keeps_nothing_for_a_backward():
    from attrs import evolve

    sizes = {**SIZES, "vision": evolve(VISION, frozen=True)}
    memory = layout_memory({"vision": parallel(), LANGUAGE: parallel()}, sizes, **STEP)
    frozen = memory["vision", 0]
    assert (frozen.gradients, frozen.optimizer, frozen.activations) == (0, 0, 0)
    assert frozen.weights > 0
