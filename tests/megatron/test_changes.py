"""What is set is undone, in reverse order, and as if it had never been set."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo_coord.megatron.changes import Changes


class Owner:
    inherited = 1

    @staticmethod
    def static() -> int:
        return 2


@given(
    before=st.dictionaries(st.sampled_from("abc"), st.integers()),
    sets=st.lists(st.tuples(st.sampled_from("abcd"), st.integers())),
)
def test_everything_is_as_it_was(before, sets):
    owner, changes = Owner(), Changes()
    vars(owner).update(before)
    for name, value in sets:
        changes.set(owner, name, value)
    assert vars(owner) == before | dict(sets)
    changes.close()
    assert vars(owner) == before


def test_a_class_and_a_module_get_back_what_they_had():
    module, changes = ModuleType("module"), Changes()
    static = vars(Owner)["static"]
    changes.set(Owner, "static", lambda: 3)
    changes.set(module, "name", "value")
    assert (Owner.static(), module.name) == (3, "value")
    changes.close()
    assert vars(Owner)["static"] is static
    assert not hasattr(module, "name")


def test_what_only_the_class_has_is_found_there_again():
    owner, changes = Owner(), Changes()
    changes.set(owner, "inherited", 5)
    changes.close()
    assert (owner.inherited, vars(owner)) == (1, {})


def test_what_somebody_else_has_set_since_stays():
    owner, changes = Owner(), Changes()
    changes.set(owner, "a", 1)
    owner.a = 2
    changes.close()
    assert owner.a == 2


def test_the_last_change_is_undone_first_and_once():
    layer, changes, undone = torch.nn.Linear(1, 1), Changes(), []
    changes.on_close(layer.register_forward_pre_hook(lambda *_: None).remove)
    changes.on_close(lambda: undone.append(len(layer._forward_pre_hooks)))
    changes.close()
    changes.close()
    assert (undone, len(layer._forward_pre_hooks)) == ([1], 0)


def test_what_cannot_be_undone_keeps_nothing_else_from_it():
    owner, changes = Owner(), Changes()
    changes.set(owner, "a", 1)
    changes.on_close(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        changes.close()
    assert vars(owner) == {}


def test_who_takes_charge_of_an_object_closes_who_had_it():
    model, config, other = Owner(), Owner(), Owner()
    first, second = Changes(), Changes()
    first.take(model, config)
    first.take(config)
    first.set(other, "a", 1)
    second.take(config)
    assert first.closed_by == "a later coordinator of the same Owner"
    assert (vars(model), vars(other), second.closed_by) == ({}, {}, "")
    second.close()
    assert vars(config) == {}
