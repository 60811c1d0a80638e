"""Check the project's own code against reference files: `python -m tests.parity DIR [--allow-unknown]`.

Every `*.npz` in DIR, and every folder that a check knows, is handed to the check of its kind, found by the
start of its name; one line is printed per file and field (`file  field  max_error  tolerance  ok|FAIL`). Exit
code 1 on any failure, on a file without a check (unless --allow-unknown), and on a folder without reference
files.
"""
import argparse
import importlib
import sys
from pathlib import Path

CHECKS = {  # start of a file's name -> the module with its check
    "sde_dpmpp_": "samplers",
    "ddim_logprob_": "samplers",
    "lora_": "lora",
    "ppo_stats_": "ddpo",
    "features_": "features",
    "metrics_": "metrics",
    "guo_eval_": "evaluator",
    "official_eval_": "evaluator",
    "official_glove_": "evaluator",
    "tmr_enc_": "tmr",
    "tmr_full_": "tmr",
    "smf_unet_": "stablemofusion",
    "mdm_": "mdm",
    "mld_": "mld",
    "t2mgpt_": "ppo",
    "ppo_math_": "ppo",
    "ppo_extra_": "ppo",
    "tm_reward_": "ppo",
    "pareto_": "pareto",
    "motioncritic_": "pareto",
    "hypervolume_bt_": "pareto",
    "stepwise_rewardloss_": "motion_reward",
    "stepwise_": "stepwise",
}


def check_file(path):
    """The rows [(field, max_error, tolerance)] of one reference file, or None if no check knows its kind.

    A check that raises (a missing key, a shape that does not fit) gives one failed row with the reason.
    """
    module = next((module for prefix, module in CHECKS.items() if path.name.startswith(prefix)), None)
    if module is None:
        return None
    try:
        rows = list(importlib.import_module(f"tests.parity.{module}").check(path))
    except Exception as error:  # one broken file must not hide the results of the others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [(f"<{reason}>", float("nan"), 0.0)]
    return rows or [("<no field was compared>", float("nan"), 0.0)]


def run(folder, allow_unknown=False, out=sys.stdout):
    """Check every reference file of `folder`, print the table, return True if nothing failed."""
    files = sorted(path for path in Path(folder).glob("*") if path.suffix == ".npz" or (
        path.is_dir() and path.name.startswith(tuple(CHECKS))))
    if not files:
        print(f"{folder}: no reference files (*.npz)", file=out)
        return False
    failures, unknown = 0, []
    for path in files:
        rows = check_file(path)
        if rows is None:
            unknown.append(path.name)
            continue
        for field, error, tolerance in rows:
            good = error <= tolerance  # False for NaN
            failures += not good
            print(f"{path.name}  {field}  {error:.3g}  {tolerance:.3g}  {'ok' if good else 'FAIL'}", file=out)
    for name in unknown:
        print(f"{name}  no check for this file", file=out)
    print(f"{len(files)} files, {failures} failed fields, {len(unknown)} files without a check", file=out)
    return failures == 0 and (allow_unknown or not unknown)


def main(argv=None):
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--allow-unknown", action="store_true", help="accept files that no check knows")
    args = parser.parse_args(argv)
    return 0 if run(args.folder, args.allow_unknown) else 1
