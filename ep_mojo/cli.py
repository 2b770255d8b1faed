"""The `ep-mojo` command. Reading arguments and printing help needs nothing but the standard library."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

from . import __version__
from .errors import ConfigError, EPError, InputFileError, MissingDependencyError
from .programs.options import separated

FORMATS = ("fp8", "fp8-power-of-two", "fp8-ue8m0", "bf16")
LAYOUTS = ("expert", "expert_padded", "rank", "gathered")
PROGRAMS = {
    "demo": "run one Mixture-of-Experts layer over several ranks on this CPU and check it",
    "run": "the same on your own tokens and routing, from an .npz file",
    "doctor": "show what this machine has, what is missing, and how to mend it",
    "bench": "time a round against NumPy and a plain memory copy, or on GPUs beside what the links need",
}
OPTIONS = {
    "n_ranks": "--ranks",
    "max_tokens_per_rank": "--tokens",
    "hidden_size": "--hidden",
    "n_experts": "--experts",
    "top_k": "--top-k",
    "output_layout": "--layout",
    "n_sms": "--sms",
}
"""Options by the config's names."""
FILE_SIZES = {
    "n_ranks": "R of x",
    "max_tokens_per_rank": "T of x",
    "hidden_size": "H of x",
    "top_k": "K of topk_ids",
    "output_layout": "--layout",
}
"""The same for `run`, which has its sizes from a file."""
SAME_NAME = ("input", "output", "plot", "repeats", "seed")
"""Options called like the field that errors name."""
BENCH_SHAPE = {"ranks": 4, "tokens": 256, "hidden": 7168, "experts": 64, "top_k": 8}
"""What `bench` times on the host unless told otherwise, and what its goals are for."""
GPU_BENCH_SHAPE = {"ranks": None, "tokens": [128, 4096], "hidden": 7168, "experts": 256, "top_k": 8}
"""The same on GPUs; as many ranks as there are GPUs."""
ERROR_STATUS = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None = those of the process.

    Returns:
        Exit status: 0 fine, 1 the result or the machine is not as it should be, 2 wrong arguments or input (one message
        on stderr), 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["doctor"]:
        from . import doctor

        return doctor.main(argv[1:])
    try:
        args = parse(argv)
        return _program(args.program).main(args)
    except EPError as error:
        print(f"ep-mojo: {type(error).__name__}: {_with_options(args.program, error)}", file=sys.stderr)
        return ERROR_STATUS
    except MemoryError as error:
        print(f"ep-mojo: out of memory: {error}. Remedy: use fewer tokens or a smaller hidden size.", file=sys.stderr)
        return ERROR_STATUS
    except KeyboardInterrupt:
        print("ep-mojo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `ep-mojo demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; an option that a program does not have is an error of that program, and shows its usage."""
    parser, added = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        added[args.program].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all programs, and that of each."""
    parser = argparse.ArgumentParser(
        prog="ep-mojo",
        description="Expert-parallel dispatch and combine for Mixture-of-Experts inference. Start with: ep-mojo demo",
    )
    parser.add_argument("--version", action="version", version=f"ep-mojo {__version__}")
    programs = parser.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    added = {name: programs.add_parser(name, help=text, add_help=name != "doctor") for name, text in PROGRAMS.items()}
    _demo_arguments(added["demo"])
    _run_arguments(added["run"])
    _bench_arguments(added["bench"])
    return parser, added


def _program(name: str):
    """The module of a program, imported now: NumPy and MAX may be missing until somebody needs them."""
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # the experts have threads of their own
        os.environ.setdefault(variable, "1")
    try:
        return importlib.import_module(f".programs.{name}", __package__)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __package__):
            raise
        from .doctor import PIP

        raise MissingDependencyError(
            f"ep-mojo {name} needs the package {missing!r}, which is not installed here",
            remedy="in a checkout use .venv/bin/ep-mojo, which any ./task makes, or install it for this Python: "
            f"{PIP} . in the checkout; `ep-mojo doctor` shows what is missing",
        ) from error


def _with_options(program: str, error: EPError) -> str:
    """The text of an error, with the options of the command line for the names of the config."""
    text = str(error)
    if not isinstance(error, (ConfigError, InputFileError)):
        return text
    if error.field in SAME_NAME:
        text = re.sub(rf"^(?={error.field} = )|(?<=choose )(?={error.field} in )", "--", text)
    text = re.sub(r", or None for the default\b", ", or leave it out", text)
    text = re.sub(r" or use BF16\(\)", "" if program == "bench" else " or use --format bf16", text)
    names = FILE_SIZES if program == "run" else OPTIONS
    return re.sub(rf"(?<![\w/.-])({'|'.join(names)})(?![\w/-]|\.\w)", lambda found: names[found[1]], text)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run one Mixture-of-Experts layer, expert-parallel over several ranks on this machine's CPU: DeepSeek-V3's "
        "router picks experts for random tokens, dispatch sends every token to the ranks of its experts, small SwiGLU "
        "experts work on it, combine brings the weighted sum back. The result is compared with the same layer computed "
        "without ranks. Exit status 1: they differ by more than rounding. The first run compiles the kernels."
    )
    _layer_arguments(parser, default_format="fp8")
    parser.add_argument("--ranks", type=int, default=4, metavar="R", help="ranks, 1 to 8 (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, metavar="T", help="tokens of each rank (default: 128)")
    parser.add_argument("--hidden", type=int, default=7168, metavar="H", help="elements of a token (default: 7168)")
    parser.add_argument("--experts", type=int, default=256, metavar="E", help="experts in all (default: 256)")
    parser.add_argument("--top-k", type=int, default=8, metavar="K", help="experts of each token (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of tokens, router and experts (default: 0)")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = """\
Run one expert-parallel layer on your own tokens and routing, check it, and write what comes back.

arrays in the input file (numpy.savez); R ranks, T tokens a rank, H hidden size, K experts a token:
  x             [R, T, H]  float32 or float16 (rounded to bfloat16), or uint16 = bits of bfloat16
  topk_ids      [R, T, K]  int32 or int64: experts of each token, twice counts twice; -1, or E and more = no expert
  topk_weights  [R, T, K]  float32: the router's weights
  num_tokens    [R]        int32 or int64, optional: tokens that count on each rank, the others come back as zeros
  w_gate, w_up  [E, F, H]  float32, optional: SwiGLU experts of any width F,
  w_down        [E, H, F]  float32, all three or none; without them experts give back what they get
  n_experts     []         integer, optional: E where there are no expert weights (default: the largest id + 1,
                           rounded up to a multiple of R)

arrays in the output file:
  out               [R, T, H]  the type of x; float32 where x is float16
  traffic           [R, R]     int64: tokens sent from rank to rank
  rows_per_expert   [E]        int64"""
    parser.add_argument("--input", required=True, metavar="IN.npz", help="file with the arrays above")
    parser.add_argument("--output", required=True, metavar="OUT.npz", help="file to write (replaced if it exists)")
    _layer_arguments(parser, default_format="bf16")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time one round (dispatch + combine) in bfloat16 and with fp8 dispatch, against vectorised NumPy and against a "
        "plain memory copy of the bytes that a round must move; and fp8 encoding against NumPy with ml_dtypes. Results "
        "are compared with the reference before anything is timed. Exit status 1: a result is wrong. Goals are "
        "for the default shape; a missed one is only reported. For steady figures let nothing else run. With --backend "
        "gpus: a round on the GPUs of this machine, a rank on each, by graph replay, beside what the links "
        "need for the same bytes alone."
    )
    parser.add_argument("--backend", choices=("cpu", "gpus"), default="cpu", help="where (default: cpu)")

    def counts(text: str) -> list[int]:
        return separated(text, int, "one number, or on GPUs several with commas, as in 128,4096")

    helps = (
        ("R", "ranks, 1 to 8", int),
        ("T", "tokens of each rank; on GPUs several numbers with commas", counts),
        ("H", "elements of a token", int),
        ("E", "experts in all", int),
        ("K", "experts of each token", int),
    )
    for (name, value), (letter, text, kind) in zip(BENCH_SHAPE.items(), helps, strict=True):
        option, there = f"--{name.replace('_', '-')}", GPU_BENCH_SHAPE[name]
        there = "all" if there is None else ",".join(map(str, there)) if isinstance(there, list) else there
        default = f"{value}" if value == there else f"{value}, on GPUs {there}"
        parser.add_argument(option, type=kind, metavar=letter, help=f"{text} (default: {default})")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="timed runs of everything (default: 20, on GPUs 50 replays)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of tokens and routing (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables (progress goes to stderr)")
    parser.add_argument("--output", metavar="FILE.json", help="also write the JSON to this file")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the times (needs matplotlib; not on GPUs)")
    gpus = parser.add_argument_group("on GPUs")
    gpus.add_argument("--formats", metavar="F", help="bf16, fp8, or bf16,fp8 (default: bf16,fp8)")
    gpus.add_argument("--mode", choices=("fused", "split"), help="one launch for each half, or two (default: fused)")
    gpus.add_argument("--sms", type=int, metavar="N", help="the most SMs that a launch may use (default: all)")


def fill_bench_defaults(args: argparse.Namespace) -> None:
    """Put the backend's defaults where `bench` was told nothing, and refuse options of the other backend.

    On the host `tokens` becomes one number.

    Raises:
        ConfigError: An option is not for this backend.
    """
    on_gpus = args.backend == "gpus"
    for name, value in (GPU_BENCH_SHAPE if on_gpus else BENCH_SHAPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if on_gpus:
        return
    for name in ("formats", "mode", "sms"):
        if getattr(args, name) is not None:
            raise ConfigError(
                field=f"--{name}",
                value=getattr(args, name),
                allowed=f"--{name} with --backend gpus",
                remedy="leave it out, or add --backend gpus",
            )
    if isinstance(args.tokens, list):
        if len(args.tokens) != 1:
            raise ConfigError(
                field="max_tokens_per_rank",
                value=args.tokens,
                allowed="one number with --backend cpu",
                remedy="run the command once for each",
            )
        args.tokens = args.tokens[0]
    if args.repeats is None:
        args.repeats = 20


def _layer_arguments(parser: argparse.ArgumentParser, default_format: str) -> None:
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=default_format,
        help=f"how tokens travel: bf16, or fp8 with one scale for 128 channels (default: {default_format})",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="expert",
        help="what dispatch gives the experts: rows grouped by expert; the same padded to equal size (takes much "
        "memory); one row for each token of a rank; or all tokens of all ranks (default: expert)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables (progress goes to stderr)")


if __name__ == "__main__":
    sys.exit(main())
