"""Which backends exist: looking up, adding, overriding, ordering, pickling, entry points."""

import importlib.metadata
import pickle
import sys
import threading
import types

import jax
import pytest
from third_party import EagerBackend, PlainBackend, backend

from attnsel_jax import (
    AttentionBackend,
    AttentionBackendEnum,
    AttentionSelectorConfig,
    NoAttentionBackendError,
    get_attn_backend,
    register_backend,
    resolve_obj_by_qualname,
    select,
    unregister_backend,
)
from attnsel_jax.backend_names import VLLM_NAMES
from attnsel_jax.registry import _REGISTRY, BUILT_IN, _Registry, automatic_backends, generation

QUESTION = (64, "float32", "auto", 16)


def names():
    return [member.name for member in AttentionBackendEnum]


def test_members_are_the_one_table_in_order():
    assert names() == list(BUILT_IN)
    assert len(AttentionBackendEnum) == len(BUILT_IN)
    assert [member.name for member in automatic_backends()] == list(BUILT_IN)


def test_looking_up():
    xla = AttentionBackendEnum["XLA"]
    assert xla is AttentionBackendEnum["XLA"]
    assert xla == AttentionBackendEnum.XLA
    assert xla in AttentionBackendEnum
    assert "XLA" in AttentionBackendEnum
    assert "NOPE" not in AttentionBackendEnum
    assert xla.name == "XLA"
    assert repr(xla) == "AttentionBackendEnum.XLA"


def test_looking_up_what_is_not_there():
    with pytest.raises(KeyError, match=r"backend is 'XLAA' \(did you mean .*XLA.*must be one of"):
        AttentionBackendEnum["XLAA"]
    with pytest.raises(AttributeError, match=r"backend is 'XLAA'"):
        AttentionBackendEnum.XLAA  # noqa: B018


def test_the_registry_has_none_of_vllms_names():
    every = ", ".join(BUILT_IN)
    with pytest.raises(KeyError) as caught:
        AttentionBackendEnum["FLASH_ATTN"]
    assert str(caught.value) == (
        f"backend is 'FLASH_ATTN', must be one of {every}; of vLLM's name use one that it may "
        f"mean: MOSAIC_GPU or MOSAIC_TPU"
    )
    with pytest.raises(ValueError, match=r"^before is 'auto', must be one of [A-Z_, ]*$"):
        register_backend("MINE", backend("MINE"), before="auto")


def test_equality_hash_and_pickle_go_by_name():
    xla, cudnn = AttentionBackendEnum["XLA"], AttentionBackendEnum["CUDNN"]
    assert xla != cudnn
    assert xla != "XLA"
    assert len({xla, cudnn, AttentionBackendEnum["XLA"]}) == 2
    assert pickle.loads(pickle.dumps(xla)) == xla
    assert hash(pickle.loads(pickle.dumps(xla))) == hash(xla)


def test_a_member_is_looked_up_by_calling_the_class_and_unknown_names_are_refused():
    xla = AttentionBackendEnum.XLA
    assert AttentionBackendEnum("XLA") is AttentionBackendEnum(xla) is xla
    with pytest.raises(ValueError, match=r"backend is 'NOPE', must be one of MOSAIC_GPU, "):
        AttentionBackendEnum("NOPE")


def test_members_are_constant():
    with pytest.raises(AttributeError, match=r"use register_backend to override its class"):
        AttentionBackendEnum["XLA"].name = "OTHER"


def test_path_and_class():
    xla = AttentionBackendEnum["XLA"]
    assert xla.get_path() == "attnsel_jax.backends.xla:XlaBackend"
    assert xla.get_path(include_classname=False) == "attnsel_jax.backends.xla"
    assert xla.get_class().__name__ == "XlaBackend"
    assert resolve_obj_by_qualname(xla.get_path()) is xla.get_class()
    assert resolve_obj_by_qualname("attnsel_jax.backends.xla.XlaBackend") is xla.get_class()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere_at_all.backend:X", ImportError, "nowhere_at_all"),
        ("attnsel_jax.backends.xla:Nope", ValueError, "attnsel_jax.backends.xla has no 'Nope'"),
        ("justaword", ValueError, "qualname is 'justaword', must be like package.module:name"),
        ("", ValueError, "qualname is '', must be like"),
        ("third_party:", ValueError, "qualname is 'third_party:', must be like"),
        ("third_party:PlainBackend.", ValueError, "must be like package.module:name"),
        ("third_party:PlainBackend.Nope", ValueError, "third_party has no 'PlainBackend.Nope'"),
    ],
)
def test_paths_that_lead_nowhere(path, error, message):
    with pytest.raises(error, match=message):
        resolve_obj_by_qualname(path)


class Room:
    """Where a class within a class is."""

    class Mine(PlainBackend):
        name = "MINE"


def test_the_path_of_a_class_within_a_class_leads_to_it():
    register_backend("MINE", Room.Mine)
    path = AttentionBackendEnum["MINE"].get_path()
    assert path.endswith(":Room.Mine")
    assert resolve_obj_by_qualname(path) is Room.Mine
    register_backend("MINE", path)
    assert get_attn_backend(*QUESTION, backend="MINE") is Room.Mine


def test_a_third_partys_name_becomes_a_member_by_decorator():
    @register_backend("MINE")
    class MineBackend(PlainBackend):
        name = "MINE"

    assert AttentionBackendEnum["MINE"].get_class() is MineBackend
    assert AttentionBackendEnum["MINE"] in list(AttentionBackendEnum)
    assert get_attn_backend(*QUESTION, backend="mine") is MineBackend


def test_two_third_parties_do_not_share_a_slot():
    register_backend("MINE", backend("MINE"))
    register_backend("THEIRS", backend("THEIRS"))
    assert get_attn_backend(*QUESTION, backend="MINE").name == "MINE"
    assert get_attn_backend(*QUESTION, backend="THEIRS").name == "THEIRS"
    assert not AttentionBackendEnum["MINE"].is_overridden()


@pytest.mark.parametrize("path", ["third_party:PlainBackend", "third_party.PlainBackend"])
def test_a_dotted_path_is_imported_when_it_is_first_needed(path):
    assert register_backend("PLAIN", path) is None
    member = AttentionBackendEnum["PLAIN"]
    assert member.get_path() == "third_party:PlainBackend"
    assert member.get_class() is PlainBackend


def test_a_path_to_a_package_that_is_not_installed_is_a_reason_not_a_crash():
    register_backend("ABSENT", "nowhere_at_all.backend:AbsentBackend", before="XLA")
    answer = select(AttentionSelectorConfig(*QUESTION))
    assert answer.backend.name == "XLA"
    (reason,) = answer.reasons["ABSENT"]
    assert str(reason).startswith("import is failing (ModuleNotFoundError: No module named")


def test_a_path_to_something_else_is_the_programmers_error():
    register_backend("WRONG", "third_party:NOT_A_BACKEND")
    with pytest.raises(TypeError, match=r"WRONG is 3, must be a subclass of AttentionBackend"):
        AttentionBackendEnum["WRONG"].get_class()


def test_a_plug_in_never_joins_automatic_selection_unless_it_says_before_what():
    register_backend("MINE", backend("MINE"))
    assert get_attn_backend(*QUESTION).name == "XLA"
    assert AttentionBackendEnum["MINE"] not in automatic_backends()
    assert select(AttentionSelectorConfig(*QUESTION)).status("MINE") == "by name only"


@pytest.mark.parametrize("how", ["argument", "class", "argument and path"])
def test_before_gives_the_place_in_automatic_selection(how):
    if how == "argument":
        register_backend("MINE", backend("MINE"), before="XLA")
    elif how == "class":
        register_backend("MINE", backend("MINE", before="XLA"))
    else:
        register_backend("MINE", "third_party:MINE", before="XLA")
        import third_party

        third_party.MINE = backend("MINE")
    assert names().index("MINE") == names().index("XLA") - 1
    assert get_attn_backend(*QUESTION).name == "MINE"


def test_before_a_slower_backend_does_not_come_first():
    register_backend("MINE", backend("MINE"), before="XLA_REFERENCE")
    assert get_attn_backend(*QUESTION).name == "XLA"
    assert get_attn_backend(*QUESTION, backend="MINE").name == "MINE"


def test_before_something_unknown():
    with pytest.raises(ValueError, match=r"before is 'XLAX' .*must be one of MOSAIC_GPU"):
        register_backend("MINE", backend("MINE"), before="XLAX")
    assert "MINE" not in AttentionBackendEnum


@pytest.mark.parametrize("name", ["XLA", AttentionBackendEnum["XLA"]])
@pytest.mark.parametrize("target", [backend("XLA"), "third_party:PlainBackend"])
def test_override_and_clear_override(name, target):
    member, before = AttentionBackendEnum["XLA"], names()
    built_in = member.get_class()
    assert not member.is_overridden()
    register_backend(name, target)
    assert member.is_overridden()
    assert member.get_class() is not built_in
    assert get_attn_backend(*QUESTION) is member.get_class()
    assert names() == before, "an override keeps the name's place"
    member.clear_override()
    assert not member.is_overridden()
    assert get_attn_backend(*QUESTION) is built_in


def test_an_overriding_class_of_another_name_prints_as_the_member():
    register_backend("XLA", backend("FASTER"))
    answer = select(AttentionSelectorConfig(*QUESTION))
    assert answer.backend.name == "FASTER"
    assert answer.status("XLA") == "chosen"
    assert answer.to_json()["backend"] == "XLA"


def test_a_traced_function_keeps_the_class_that_an_override_replaces():
    def traced():
        found.append(get_attn_backend(*QUESTION).name)
        return 0

    found = []
    jitted = jax.jit(traced)
    jitted()
    register_backend("XLA", backend("FASTER"))
    jitted()
    assert found == ["XLA"]
    jax.jit(lambda: traced())()
    assert found == ["XLA", "FASTER"]


def test_an_override_does_not_drop_its_before():
    with pytest.raises(
        ValueError, match=r"before is 'MOSAIC_GPU', must be None: XLA is registered"
    ):
        register_backend("XLA", backend("XLA"), before="MOSAIC_GPU")
    register_backend("MINE", backend("MINE"), before="XLA")
    register_backend("MINE", backend("MINE"), before="XLA")  # a notebook's cell, run again
    with pytest.raises(ValueError, match=r"before is 'CUDNN', must be 'XLA' or None"):
        register_backend("MINE", backend("MINE"), before="CUDNN")


def test_no_two_names_are_aliases():
    with pytest.raises(ValueError, match=r"name is 'MINE', must be 'XLA', as XlaBackend.name says"):
        register_backend("MINE", AttentionBackendEnum["XLA"].get_class())
    classes = [member.get_class() for member in AttentionBackendEnum]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("name", ["AUTO", *VLLM_NAMES])
def test_reserved_names(name):
    with pytest.raises(ValueError, match=rf"name is '{name}', which is taken"):
        register_backend(name, backend(name))


@pytest.mark.parametrize("name", ["mine", "MY-OWN", "", "1ST", "MY OWN", "MINÉ", "_MINE"])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match=r"must be upper case letters, digits and underscores"):
        register_backend(name, backend("MINE"))


def test_registering_what_is_no_backend():
    with pytest.raises(TypeError, match=r"target is 3, must be a subclass of AttentionBackend or"):
        register_backend("MINE", 3)
    with pytest.raises(TypeError, match=r"target is .*int.*must be a subclass of AttentionBackend"):
        register_backend("MINE")(int)
    with pytest.raises(TypeError, match=r"name is 3, must be text or a member"):
        register_backend(3, PlainBackend)
    with pytest.raises(ValueError, match=r"target is 'my backend', must be like package.module"):
        register_backend("MINE", "my backend")  # it would have failed every selection after it
    assert "MINE" not in AttentionBackendEnum


@pytest.mark.parametrize("name", ["MINE", "XLA"])
def test_a_class_without_a_name(name):
    class Nameless(AttentionBackend):
        capabilities, kernels = PlainBackend.capabilities, PlainBackend.kernels

    with pytest.raises(
        ValueError, match=rf"^Nameless.name is not set, must be text such as '{name}"
    ):
        register_backend(name, Nameless)
    with pytest.raises(ValueError, match=r"backend is .*Nameless.*, must be .* that has a name"):
        select(AttentionSelectorConfig(*QUESTION), backend=Nameless)


def test_a_member_is_as_good_as_its_name():
    register_backend("MINE", backend("MINE"), before=AttentionBackendEnum["XLA"])
    assert names().index("MINE") == names().index("XLA") - 1
    unregister_backend(AttentionBackendEnum["MINE"])
    assert "MINE" not in AttentionBackendEnum


def test_unregistering():
    register_backend("MINE", backend("MINE"))
    member = AttentionBackendEnum["MINE"]
    unregister_backend("MINE")
    assert "MINE" not in AttentionBackendEnum
    with pytest.raises(ValueError, match=r"backend is 'MINE'"):
        member.get_class()
    with pytest.raises(ValueError, match=r"backend is 'MINE'"):
        unregister_backend("MINE")
    with pytest.raises(
        ValueError, match=r"name is XLA, must be a plug-in's: built-in backends stay"
    ):
        unregister_backend("XLA")


def test_every_change_moves_the_generation():
    seen = [generation()]
    register_backend("MINE", backend("MINE"))
    seen.append(generation())
    register_backend("MINE", backend("MINE"))
    seen.append(generation())
    AttentionBackendEnum["MINE"].clear_override()
    seen.append(generation())
    unregister_backend("MINE")
    seen.append(generation())
    assert seen == sorted(set(seen))


@pytest.fixture
def entry_points(monkeypatch):
    """Makes the registry find these entry points, in a registry of its own."""

    def install(**offered):
        points = [types.SimpleNamespace(name=n, value=v) for n, v in offered.items()]

        def fake(*, group):
            return points if group == "attnsel_jax.backends" else ()

        monkeypatch.setattr(importlib.metadata, "entry_points", fake)
        fresh = _Registry()
        monkeypatch.setattr("attnsel_jax.registry._REGISTRY", fresh)
        return fresh

    return install


def test_an_entry_point_becomes_a_member(entry_points):
    entry_points(PLAIN="third_party:PlainBackend", EAGER="third_party:EagerBackend")
    assert AttentionBackendEnum["PLAIN"].get_class() is PlainBackend
    assert AttentionBackendEnum["EAGER"].get_class() is EagerBackend
    assert [m.name for m in automatic_backends()][:3] == ["MOSAIC_GPU", "MOSAIC_TPU", "EAGER"]
    assert AttentionBackendEnum["PLAIN"] not in automatic_backends()


def test_an_entry_point_that_does_not_import_is_a_reason(entry_points):
    entry_points(ABSENT="nowhere_at_all:AbsentBackend")
    answer = select(AttentionSelectorConfig(*QUESTION), backend="ABSENT")
    assert "ModuleNotFoundError" in str(answer.reasons["ABSENT"][0])


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no driver"), AttributeError("no jax.x"), ValueError("v"), TypeError("t")],
)
def test_a_package_that_raises_at_import_is_refused_and_stops_no_other(
    entry_points, monkeypatch, error
):
    class Finder:
        @staticmethod
        def find_spec(fullname, path=None, target=None):
            if fullname == "broken_package":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    entry_points(BROKEN="broken_package:BrokenBackend")
    answer = select(AttentionSelectorConfig(*QUESTION))
    assert answer.backend.name == "XLA"
    (reason,) = answer.reasons["BROKEN"]
    assert f"broken_package raises {type(error).__name__}: {error}" in str(reason)
    assert reason.cause.__cause__ is error
    with pytest.raises(NoAttentionBackendError, match="import is failing"):
        select(AttentionSelectorConfig(*QUESTION), backend="BROKEN").required()


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        (
            "XLA",
            "third_party:PlainBackend",
            "name is 'XLA', which is taken by attnsel_jax.backends",
        ),
        ("FLASH_ATTN", "third_party:PlainBackend", "name is 'FLASH_ATTN'"),
        ("plain", "third_party:PlainBackend", "name is 'plain', must be"),
        ("OTHER", "third_party:PlainBackend", "name is 'OTHER', must be 'PLAIN'"),
        ("NOPE", "third_party:NopeBackend", "third_party has no 'NopeBackend'"),
        ("THREE", "third_party:NOT_A_BACKEND", "must be a subclass of AttentionBackend"),
    ],
)
def test_a_bad_entry_point_changes_nothing_and_is_reported(entry_points, name, path, message):
    """Installing a package must neither override a backend nor stop all of them."""
    entry_points(**{name: path, "EAGER": "third_party:EagerBackend"})
    with pytest.warns(RuntimeWarning, match=rf"{name} = {path} is left out: .*{message}"):
        found = list(AttentionBackendEnum)
    assert [m.name for m in found if m.name not in BUILT_IN] == ["EAGER"]
    assert not AttentionBackendEnum["XLA"].is_overridden()


def test_other_threads_wait_until_the_entry_points_are_found(entry_points, monkeypatch):
    fresh = entry_points(EAGER="third_party:EagerBackend")
    inside, go = threading.Event(), threading.Event()
    find = importlib.metadata.entry_points

    def slow(*, group):
        inside.set()
        assert go.wait(10)
        return find(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", slow)
    seen = []
    first = threading.Thread(target=lambda: seen.append("EAGER" in fresh.entries()))
    second = threading.Thread(target=lambda: seen.append("EAGER" in fresh.entries()))
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.05)
    go.set()
    first.join(10)
    second.join(10)
    assert seen == [True, True]


def test_threads_that_register_at_once_lose_nothing():
    barrier = threading.Barrier(8)

    def add(i):
        barrier.wait()
        for j in range(5):
            register_backend(f"T{i}_{j}", backend(f"T{i}_{j}"))
            get_attn_backend(*QUESTION)

    threads = [threading.Thread(target=add, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {f"T{i}_{j}" for i in range(8) for j in range(5)} <= set(names())
    assert _REGISTRY.generation == generation()


def test_what_a_subclass_must_be():
    assert issubclass(AttentionBackendEnum["XLA"].get_class(), AttentionBackend)
