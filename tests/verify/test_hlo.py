"""What is read from a compiler's text, on texts as the compilers write them."""

import pytest

from shardinit.verify.audit import hlo

# As libtpu, XLA:GPU and XLA:CPU write: fusions, a loop, an asynchronous collective.
TEXT = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(u32[2]{0})->f32[64,6]}

FileNames
1 "/somewhere.py"

%fused_computation (p.1: u32[2]) -> f32[4096,6] {
  %p.1 = u32[2]{0:T(128)} parameter(0)
  %inside = f32[1000000,6]{1,0} broadcast(%p.1), dimensions={}
  ROOT %r = f32[4096,6]{0,1:T(8,128)} convert(%inside)
}

%body.2 (arg.1: (s32[], f32[128])) -> (s32[], f32[128]) {
  %arg.1 = (s32[], f32[128]{0}) parameter(0)
  %x = f32[128]{0} get-tuple-element(%arg.1), index=1
  %y = f32[128]{0} add(%x, %x)
  ROOT %t = (s32[], f32[128]{0}) tuple(%i, %y)
}

%cond.2 (arg.2: (s32[], f32[128])) -> pred[] {
  %arg.2 = (s32[], f32[128]{0}) parameter(0)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

ENTRY %main.3_spmd (param: u32[2]) -> f32[64,6] {
  %param = u32[2]{0:T(128)} parameter(0), sharding={replicated}
  %fusion.1 = f32[4096,6]{0,1:T(8,128)} fusion(%param), kind=kLoop, \
calls=%fused_computation, metadata={op_name="jit(f)/all-gather"}
  %near = f32[128]{0:T(128)S(1)} copy(%param)
  %w = (s32[], f32[128]{0}) while(%init), condition=%cond.2, body=%body.2, \
backend_config={"known_trip_count":{"n":"5"}}
  %ag = (f32[2,6]{1,0}, f32[64,6]{1,0}) all-gather-start(%fusion.1), dimensions={0}
  %agd = f32[64,6]{1,0} all-gather-done(%ag)
  ROOT %out = f32[64,6]{0,1:T(8,128)} copy(%agd)
}
"""


def test_collectives_are_found_once_and_only_as_instructions():
    module = hlo.parse(TEXT)
    assert module.collectives() == ["all-gather of f32[2,6], f32[64,6]"]


def test_values_inside_a_fusion_take_no_memory():
    lines = {line.name: times for line, times, _ in hlo.parse(TEXT).materialised()}
    assert "inside" not in lines
    assert {"fusion.1", "ag", "out"} <= set(lines)
    assert lines["fusion.1"] == 1


def test_a_loop_counts_as_often_as_it_runs():
    lines = {line.name: times for line, times, _ in hlo.parse(TEXT).materialised()}
    assert lines["y"] == 5


def test_bytes_moved_count_writes_and_reads_in_main_memory():
    text = """\
HloModule m

ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %a = f32[100]{0:S(1)} negate(%p)
  ROOT %b = f32[100]{0} add(%a, %p)
}
"""
    # Read p and write a where it costs nothing; read that and p again; write b.
    assert hlo.parse(text).bytes_moved() == 3 * 400


def test_the_result_has_the_layout_of_the_entry():
    (shape,) = hlo.parse(TEXT).results
    assert (shape.dtype, shape.dims) == ("f32", (64, 6))
    assert (shape.bytes, shape.padded_bytes) == (64 * 6 * 4, 64 * 2 * 8 * 4)


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        # Sizes that libtpu 0.0.50 allocated for v5p.
        (hlo.Shape("f32", (64, 6), "0,1:T(8,128)"), 4096),
        (hlo.Shape("bf16", (64, 6), "0,1:T(8,128)(2,1)"), 2048),
        (hlo.Shape("pred", (1, 5, 7), "2,1,0:T(8,128)(4,1)"), 1024),
        (hlo.Shape("s8", (1, 5), "1,0:T(4,128)(4,1)"), 512),
        (hlo.Shape("f32", (1, 3, 3, 10), "3,0,2,1:T(1,128)"), 4608),
        (hlo.Shape("f32", (), ":T(128)"), 512),
        (hlo.Shape("f32", (64, 256), "1,0"), 65536),
        (hlo.Shape("s4", (7,), "0"), 4),
        (hlo.Shape("f8e4m3fn", (7,), "0"), 7),
    ],
)
def test_bytes_of_a_layout(shape, padded):
    assert shape.padded_bytes == padded


def test_a_text_of_another_form_is_refused_and_not_called_clean():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule m\n\nsomething else\n")
