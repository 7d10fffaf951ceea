"""Checks, tunes and measures everything on a GPU machine that has PyTorch and Triton and nothing else.

    git archive --prefix=isotile/ -o isotile.tar HEAD        # here; carry it there
    tar xf isotile.tar && python isotile/bench/on_gpu.py --out results      # there; carry `results` back
    isotile tune --install results/tuning                    # here; then commit the tables

It runs from the source tree: no build, no network, no C++ extension. In order, within --minutes in all: the kernels
against the float64 truth on drawn calls, `isotile tune`, `isotile bench --suite h100`. What is done when
time runs out, or at Ctrl-C, is in the folder; the same command goes on from there. Exit code 0: all of it is done.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

import isotile  # noqa: E402

if str(ROOT) not in isotile.__path__:  # kernels/ is installed as isotile.kernels; here it stands beside the package
    isotile.__path__.append(str(ROOT))


def check(folder: Path, minutes: float, device: str) -> int:
    """Every operator and dtype on drawn calls, in turn, against the derived bounds. Returns failures."""
    import torch

    from isotile import BackendError, registry
    from isotile.testing import check_recipe, draw_recipe, repeat_line
    from isotile.testing.draws import Seeded

    failed, done, began = 0, 0, time.monotonic()
    with (folder / "check.jsonl").open("w", encoding="utf-8") as file:
        for seed in range(1000):
            for spec in registry.specs().values():
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    if seed and time.monotonic() - began > 60 * minutes:
                        print(f"{done} drawn calls, {failed} failed", flush=True)
                        return failed
                    recipe = draw_recipe(Seeded(seed), spec, dtype)
                    record = {"recipe": recipe, "status": "ok"}
                    try:
                        record["bound_share"] = check_recipe(recipe, "triton", device)
                    except BackendError as refusal:
                        record.update(status="refused", reason=str(refusal))
                    except Exception as error:  # counted, written and printed; the others still run
                        failed += 1
                        record.update(status="failed", reason=f"{type(error).__name__}: {str(error)[:2000]}")
                        print(f"{repeat_line(recipe, 'triton')}: {record['reason'][:400]}", flush=True)
                    done += 1
                    file.write(json.dumps(record) + "\n")
                    file.flush()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for everything that is carried back")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--only", choices=("check", "tune", "bench"), nargs="+", default=["check", "tune", "bench"])
    parser.add_argument("--device", default="cuda", help="cpu: the check alone, in Triton's interpreter")
    args = parser.parse_args()
    began = time.monotonic()

    def left(share: float) -> str:
        return f"{max(args.minutes - (time.monotonic() - began) / 60, 0.1) * share:.2f}"

    args.out.mkdir(parents=True, exist_ok=True)
    code = 0
    if "check" in args.only:
        failed = check(args.out, args.minutes * (0.2 if len(args.only) > 1 else 1.0), args.device)
        print(f"== check: {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
        code |= failed > 0
    tables = args.out / "tuning"
    if "tune" in args.only:
        from isotile.tuning.command import main as tune

        share = 0.5 if "bench" in args.only else 1.0
        found = tune(["--device", args.device, "--out", str(tables), "--minutes", left(share)])
        print(f"== tune: exit {found}, {time.monotonic() - began:.0f} s", flush=True)
        if found == 130:
            return found
        code |= found
    if "bench" in args.only:
        from isotile import tuning
        from isotile.bench.gpu_suite import run

        tuning.user_folder = lambda: tables  # the tables just made serve the bench
        tuning.entries.cache_clear()
        found = run(["--device", args.device, "--out", str(args.out), "--minutes", left(1.0)])
        print(f"== bench: exit {found}, {time.monotonic() - began:.0f} s", flush=True)
        code |= found
    return code


if __name__ == "__main__":
    sys.exit(main())
