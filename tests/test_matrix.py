import pytest

from attnsel_jax import AttentionBackend, Capabilities, OneOf, matrix, register_backend
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import EITHER, MultipleOf
from attnsel_jax.platforms import CHIPS
from attnsel_jax.registry import BUILT_IN, AttentionBackendEnum


def row_of(name, op):
    return next(row for row in matrix.rows() if (row.backend.name, row.op) == (name, op))


def test_every_declared_op_has_a_row_and_every_backend_is_named():
    declared = {
        (name, op)
        for name in BUILT_IN
        for op in AttentionBackendEnum[name].get_class().capabilities
    }
    assert {(row.backend.name, row.op) for row in matrix.rows(BUILT_IN)} == declared
    shown = {name for name, _ in declared} | set(matrix.without_kernels(BUILT_IN))
    assert shown == set(BUILT_IN)
    assert all(name in matrix.docs_page() for name in BUILT_IN)


def test_every_field_of_the_declaration_is_shown():
    shown = set(matrix.VALUES) | set(matrix.FEATURES) | set(matrix._MACHINE)
    assert shown == set(Capabilities.__dataclass_fields__)


@pytest.mark.parametrize("field", matrix.FEATURES)
def test_feature_cells_say_what_selection_does(field):
    """A cell is held against `validate_configuration` of a question that asks for the feature."""
    if field == "causal":
        return
    for row in matrix.rows(BUILT_IN):
        question = {
            "head_size": 64 if row.op in ("dense", "paged") else 576,
            "dtype": "bfloat16",
            "op": row.op,
            "use_mla": row.backend.is_mla(),
            "use_sparse": row.backend.is_sparse(),
            field: True,
        }
        chips = [chip for chip in CHIPS.values() if row.runs_on(chip)]
        asked = AttentionSelectorConfig(**question)
        reasons = [row.backend.validate_configuration(asked, chip) for chip in chips]
        refused = [any(reason.argument == field for reason in of_chip) for of_chip in reasons]
        assert (row.feature(field) == "no") == all(refused), (row.name, field)


@pytest.mark.parametrize("chip", CHIPS)
def test_chip_cells_say_what_selection_does(chip):
    for row in matrix.rows(BUILT_IN):
        config = AttentionSelectorConfig(
            64,
            "bfloat16",
            op=row.op,
            use_mla=row.backend.is_mla(),
            use_sparse=row.backend.is_sparse(),
        )
        reasons = row.backend.validate_configuration(config, CHIPS[chip])
        machine = [reason for reason in reasons if reason.argument in matrix._MACHINE]
        assert row.runs_on(CHIPS[chip]) == (not machine), row.name


def test_cells_of_values():
    cudnn = row_of("CUDNN", "dense")
    assert cudnn.value("dtype") == "bfloat16, float16"
    assert cudnn.value("head_size") == "a multiple of 8, at most 256"
    assert cudnn.value("head_size_v") == "as head size"
    assert cudnn.value("block_size") == "-"
    assert "Hopper" in matrix.besides(cudnn.backend)
    assert row_of("XLA", "paged").value("block_size") == "any"


def test_plug_ins_are_shown_but_not_in_the_docs():
    before = matrix.docs_page()

    @register_backend("PLUGGED_IN", before="MOSAIC_TPU")
    class PluggedIn(AttentionBackend):
        name = "PLUGGED_IN"
        capabilities = {
            "dense": Capabilities(
                platform=OneOf("tpu"),
                generation=OneOf("v6e", "7x"),
                dtype=OneOf("bfloat16"),
                head_size=MultipleOf(128),
                has_bias=EITHER,
            )
        }
        kernels = {"dense": "attnsel_jax.xla.dense:dense_attention"}

    assert matrix.docs_page() == before
    row = row_of("PLUGGED_IN", "dense").to_json()
    assert row["chips"] == ["v6e", "7x"]
    assert row["features"]["has_bias"] == "yes"
    assert row["features"]["causal"] == "always"
    assert row["features"]["needs_grad"] == "no"
    assert matrix.to_json()["automatic"]["v6e"]["dense"] == "PLUGGED_IN"
    assert matrix.to_json()["automatic"]["v5e"]["dense"] == "MOSAIC_TPU"


def test_the_block_is_replaced_and_nothing_else():
    text = f"a\n{matrix.BEGIN}\nold\n{matrix.END}\nb\n"
    written = matrix.with_block(text, "new")
    assert written == f"a\n{matrix.BEGIN}\n\nnew\n\n{matrix.END}\nb\n"
    assert matrix.with_block(written, "new") == written


@pytest.mark.parametrize(
    "text", ["", matrix.BEGIN, matrix.END + matrix.BEGIN, (matrix.BEGIN + matrix.END) * 2]
)
def test_missing_markers_are_refused(text):
    with pytest.raises(ValueError, match="must have one of each"):
        matrix.with_block(text, "new")


def test_tables_are_rectangles():
    for line_group in matrix.docs_page().split("\n\n"):
        if line_group.startswith("|"):
            assert len({line.count("|") for line in line_group.splitlines()}) == 1
