"""Parts of `ep-mojo bench --backend gpus` that need no GPU: options, bytes over the links, the report."""

from __future__ import annotations

import numpy as np
import pytest

from ep_mojo import cli
from ep_mojo.errors import ConfigError, DeviceError
from ep_mojo.programs import bench_gpus, link, report
from ep_mojo.programs.gpu_round import ERROR_LIMIT, Round, draw, error_of, gpus_to_use

CASE = Round(ranks=3, tokens=7, fmt="fp8", fused=True, hidden=256, experts=6, top_k=2)


@pytest.fixture
def gpus(monkeypatch):
    """Makes MAX see so many GPUs."""
    driver = pytest.importorskip("max.driver")
    return lambda count: monkeypatch.setattr(driver, "accelerator_count", lambda: count)


def parsed(*argv):
    args = cli.parse(["bench", *argv])
    cli.fill_bench_defaults(args)
    return args


def test_each_backend_has_its_defaults():
    args = parsed()
    assert {name: getattr(args, name) for name in cli.BENCH_SHAPE} == cli.BENCH_SHAPE
    assert args.repeats == 20
    args = parsed("--backend", "gpus")
    assert {name: getattr(args, name) for name in cli.GPU_BENCH_SHAPE} == cli.GPU_BENCH_SHAPE
    assert parsed("--backend", "gpus", "--tokens", "1,64").tokens == [1, 64]
    assert parsed("--tokens", "64").tokens == 64


@pytest.mark.parametrize("option", [["--sms", "8"], ["--mode", "split"], ["--formats", "fp8"]])
def test_options_of_gpus_are_refused_on_the_host(option):
    with pytest.raises(ConfigError, match=f"{option[0]} = .*with --backend gpus.*Remedy: leave it out"):
        parsed(*option)


def test_one_number_of_tokens_on_the_host():
    with pytest.raises(ConfigError, match=r"max_tokens_per_rank = \[1, 2\].*one number"):
        parsed("--tokens", "1,2")


@pytest.mark.parametrize(
    ("there", "argv", "message"),
    [
        (0, [], "DeviceError: --ranks = 'all': MAX sees 0 GPUs here. Allowed: a machine with 2 GPUs or more"),
        (1, [], "DeviceError: --ranks = 'all': MAX sees 1 GPU here"),
        (
            4,
            ["--ranks", "8"],
            "MAX sees 4 GPUs here. Allowed: up to 4. Remedy: see `ep-mojo doctor`; use --backend cpu",
        ),
        (4, ["--ranks", "8"], "; ask for fewer --ranks"),
        (4, ["--ranks", "1"], "ConfigError: --ranks = 1. Allowed: an integer from 2 to 8"),
        (3, [], "--experts = 256. Allowed: a multiple of --ranks = 3"),
        (4, ["--formats", "fp8,int8"], "--formats = 'fp8,int8'. Allowed: bf16, fp8, or bf16,fp8"),
        (4, ["--tokens", "128,0"], "--tokens = 0"),
        (4, ["--hidden", "200"], "--hidden = 200"),
        (4, ["--top-k", "9", "--experts", "8"], "--top-k = 9"),
        (4, ["--sms", "-1"], "--sms = -1"),
        (
            4,
            ["--sms", "0"],
            "--sms = 0. Allowed: an integer from 1 to 1024. Remedy: choose --sms in that range, or leave",
        ),
        (
            4,
            ["--sms", "5000"],
            "--sms = 5000. Allowed: an integer from 1 to 1024. Remedy: choose --sms in that range, or",
        ),
        (0, ["--sms", "0"], "ConfigError: --sms = 0"),
        (0, ["--hidden", "200"], "ConfigError: --hidden = 200"),
        (0, ["--ranks", "1"], "ConfigError: --ranks = 1"),
        (0, ["--formats", "int8"], "ConfigError: --formats = 'int8'"),
        (0, ["--ranks", "3"], "--experts = 256. Allowed: a multiple of --ranks = 3"),
        (4, ["--repeats", "0"], "--repeats = 0"),
        (4, ["--plot", "a.png"], "--plot = 'a.png'. Allowed: --plot with --backend cpu"),
        (4, ["--output", "/nowhere/at/all.json"], "--output = '/nowhere/at/all.json'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_errors_are_one_message_and_status_2(gpus, capsys, there, argv, message):
    gpus(there)
    assert cli.main(["bench", "--backend", "gpus", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Remedy: " in err
    assert "Traceback" not in err


def test_remedies_can_be_typed(gpus, capsys):
    gpus(4)
    cli.main(["bench", "--backend", "gpus", "--sms", "5000"])
    assert "None" not in capsys.readouterr().err


def test_tokens_that_are_no_numbers(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--tokens", "12,abc")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "argument --tokens: '12,abc'. Allowed: one number, or on GPUs several with commas, as in 128,4096" in err


def test_all_gpus_up_to_eight(gpus):
    gpus(16)
    assert gpus_to_use(0, least=2) == 8
    assert gpus_to_use(5, least=2) == 5
    gpus(2)
    assert gpus_to_use(0, least=2) == 2
    with pytest.raises(DeviceError):
        gpus_to_use(3)
    gpus(1)
    assert gpus_to_use() == 1
    with pytest.raises(DeviceError, match=r"1 GPU here. Allowed: a machine with 2 GPUs or more"):
        gpus_to_use(1, least=2)


def test_bytes_over_the_links_counted_one_by_one():
    cfg, ids = CASE.config(), draw(CASE)[CASE.ranks : 2 * CASE.ranks]
    ids[0][0] = [-1, 6]  # no experts
    sent, received = np.zeros(3, int), np.zeros(3, int)
    message, row = cfg.dispatch_format.message_bytes(256), 2 * 256
    for source in range(3):
        for other in set(range(3)) - {source}:
            table = 7 * 2 * (2 + 4)
            pairs = sum(any(i // 2 == other and 0 <= i < 6 for i in token) for token in ids[source])
            sent[source] += table + pairs * message
            received[other] += table + pairs * message
            sent[other] += pairs * row
            received[source] += pairs * row
    found = bench_gpus.on_link(cfg, ids, median_us=10.0, link_us=4.0)
    assert found["bytes"]["total"] == sent.sum() == received.sum()
    assert found["bytes"]["dispatch"] + found["bytes"]["combine"] == found["bytes"]["total"]
    assert found["busiest"] == max(*sent, *received)
    assert found["gb_s"] == pytest.approx(sent.sum() / 3 / 10e-6 / 1e9)
    assert (found["link_us"], found["share"]) == (4, 0.4)


def test_rows_that_make_a_round_for_the_links():
    cfg, ids = CASE.config(), draw(CASE)[CASE.ranks : 2 * CASE.ranks]
    each = report.pairs(cfg, ids)
    assert each.diagonal().tolist() == [0, 0, 0]
    busiest = max(*each.sum(axis=0), *each.sum(axis=1))
    assert 2 * link.round_rows(cfg, ids) in (busiest, busiest + 1)
    assert link.round_rows(cfg, [np.full_like(i, -1) for i in ids]) == 1
    everywhere = [np.tile([0, 2], (7, 1)).astype(np.int32)] * 3  # rank 2 gets none, ranks 0 and 1 all
    assert report.pairs(cfg, everywhere).tolist() == [[0, 7, 0], [7, 0, 0], [7, 7, 0]]
    assert link.round_rows(cfg, everywhere) == 7


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_a_wrong_result_is_over_the_limit(fmt):
    from ep_mojo.dtypes import bfloat16_bits_to_float32, e4m3_bits_to_float32, float32_to_bfloat16_bits, to_buffer
    from ep_mojo.reference.fp8 import quantize

    pytest.importorskip("max.driver")
    case = Round(ranks=3, tokens=7, fmt=fmt, fused=True, hidden=256, experts=6, top_k=2)
    given = draw(case)
    right = []
    for x, weights in zip(given[:3], given[6:], strict=True):
        seen = bfloat16_bits_to_float32(x)
        seen = seen if fmt == "bf16" else e4m3_bits_to_float32(quantize(seen)[0])
        right.append(float32_to_bfloat16_bits(seen * weights.sum(axis=1, keepdims=True)))
    assert error_of(case, [to_buffer(y, "bfloat16") for y in right], given) < ERROR_LIMIT
    right[1][3] = 0
    assert error_of(case, [to_buffer(y, "bfloat16") for y in right], given) > ERROR_LIMIT
    right[1][3] = 0x7FC0
    assert not error_of(case, [to_buffer(y, "bfloat16") for y in right], given) < ERROR_LIMIT


def test_report_has_a_line_for_each_case():
    cfg, ids = CASE.config(), draw(CASE)[3:6]
    times = {"median_us": 90.0, "p99_us": 300.0, "host_paced_us": 123.0, "wall_us": 88.0, "eager_us": 91.0}
    good = {"case": {"name": "fine"}, "error": 1e-3, "wrong": ""} | times | bench_gpus.on_link(cfg, ids, 90.0, 45.0)
    bad = {"case": {"name": "broken"}, "error": 1.0, "wrong": "relative error 1.0e+00"}
    machine = {"gpus": 3, "gpu": "a GPU", "max": "26.7.0"}
    result = {"machine": machine, "sms": 16, "replays": 50, "cases": [good, bad]}
    text = bench_gpus.report_text(result)
    assert "at most 16 SMs a launch" in text
    assert "links" in text
    (line,) = (line for line in text.splitlines() if "fine" in line)
    assert "90.0" in line
    assert "123.0" in line
    assert "50%" in line
    (line,) = (line for line in text.splitlines() if "broken" in line)
    assert "WRONG: relative error" in line
