"""Which precision demo and benchmarks take where nobody asks for one."""

import pytest
import torch
from benchmarks import cost
from demo import run_demo
from precision import choose_bf16, made_for_bf16


@pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=["neither", "AVX-512 BF16", "AMX"])
def able(request, monkeypatch):
    """A processor with what the parameters say; whether that is enough."""
    avx512, amx = request.param
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    return avx512 or amx


def test_a_processor_is_asked_what_it_can_do(able, capsys):
    assert made_for_bf16() is made_for_bf16("cpu") is choose_bf16() is able
    shown = " ".join(capsys.readouterr().out.split())
    chosen, reason = ("bfloat16", "has instructions") if able else ("float32", "has no instructions")
    assert shown == f"Training in {chosen}: this processor {reason} for bfloat16."


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_asked_for_is_done(able, wanted, capsys):
    assert choose_bf16(wanted) is wanted
    assert "as asked" in capsys.readouterr().out


def test_the_demo_and_the_benchmark_of_cost_choose_by_the_processor(able, monkeypatch, tmp_path):
    monkeypatch.setattr(run_demo, "make_inputs", lambda folder, options: seen.append(options.bf16) or 1 / 0)
    monkeypatch.setattr(cost, "optimizer_steps", lambda options: seen.append(options.bf16) or 1 / 0)
    for main, output in ((run_demo.main, "--output_dir"), (cost.main, "--output")):
        for more, expected in (([], able), (["--bf16"], True), (["--no-bf16"], False)):
            seen = []
            with pytest.raises(ZeroDivisionError):
                main([output, str(tmp_path / "out"), *more])
            assert seen == [expected]
    assert "--bf16" in run_demo.common_options(True) and "--bf16" not in run_demo.common_options(False)
