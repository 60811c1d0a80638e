"""A blind comparison by people: one HTML page with pairs of motions, and what its votes say.

  python -m results.ab_page RUN --pairs 20            # writes RUN/ab_page.html: base against tuned
  python -m results.ab_page RUN OTHER_RUN --pairs 20  # tuned against the tuned of another run
  python -m results.ab_page votes.csv [more.csv ...]  # win rates, one file a person

The page (results/ab_page.html) needs no network and no library. Pairs come in random order and sides; each
is asked about twice, for realism and for the text, as in the user study of "No MoCap Needed". Votes are
exported as CSV. In a comparison of two runs they call the motions of OTHER_RUN "base".
"""
import argparse
import base64
import csv
import json
import math
from pathlib import Path

import numpy as np
import torch

from common import InputError, evaluate, generator, render, runs
from results import studies, tables

QUESTIONS = ("realism", "text")
SCORES = {"tuned": 1.0, "equal": 0.5, "base": 0.0}


def write(path, captions, base, tuned, skeleton, seed):
    """Write the page: base and tuned are lists of joints (t j 3) in metres, one of each for every caption."""
    g = generator(seed, 0, "ab page")
    order = torch.randperm(len(captions), generator=g).tolist()
    swapped = (torch.randperm(len(captions), generator=g) % 2 == 0).tolist()  # half of them

    def packed(joints):
        motion = np.asarray(joints) - np.asarray(joints)[:1, :1] * [1, 0, 1]  # both start at the same place
        return base64.b64encode(np.round(1000 * motion).clip(-32768, 32767).astype("<i2").tobytes()).decode()
    pairs = []
    for k, swap in zip(order, swapped):
        left, right = (tuned[k], base[k]) if swap else (base[k], tuned[k])
        pairs.append({"id": k, "caption": captions[k], "left": packed(left), "right": packed(right),
                      "tuned": "left" if swap else "right"})
    study = {"id": runs.fingerprint(pairs)[:16], "fps": skeleton.fps, "joints": skeleton.joints,
             "chains": skeleton.chains, "colours": render.chain_colours(skeleton), "pairs": pairs,
             "neck": skeleton.index["neck"], "head": skeleton.index["head"]}
    text = json.dumps(study).replace("</", "<\\/")  # a caption must not end the script
    page = (Path(__file__).parent / "ab_page.html").read_text(encoding="utf-8").replace("/*STUDY*/null", text)
    runs.atomic_write(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))


def write_pairs(run, count, other=None):
    """Write run/ab_page.html: base and tuned of a finished run on the captions of `count` test clips, or the
    tuned of two runs of the same data -> the path. The motions are sampled anew, for the page alone."""
    opened = studies.reopen(run)
    samplers = opened.samplers["before"], opened.samplers["after"]
    if other:
        tables.read_results([run, other])  # of the same data
        samplers = studies.reopen(other).samplers["after"], samplers[1]
    clips, skeleton = evaluate.spread_out(opened.clips, count), opened.scorers.skeleton
    captions, _, lengths = evaluate.questions(clips, 0)
    motions = [evaluate.to_joints(*sampler(captions, lengths, "people", 0), skeleton)
               for sampler in samplers]
    write(Path(run) / "ab_page.html", captions, *motions, skeleton, 0)
    return Path(run) / "ab_page.html"


def wilson(share, n):
    """95 % interval of a share out of n by Wilson (1927); it stays inside 0 and 1 and is never of width 0."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def read_votes(path):
    """CSV of the page -> [(study, pair, question, preferred)]; InputError with the line that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    votes = []
    for number, row in enumerate(rows, start=2):
        vote = tuple(row.get(name) for name in ("study", "pair", "question", "preferred"))
        if None in vote or vote[2] not in QUESTIONS or vote[3] not in SCORES:
            raise InputError(f"{path}, line {number}: no vote of the page; export it again")
        votes.append(vote)
    if not votes:
        raise InputError(f"{path}: holds no vote")
    return votes


def win_rates(paths):
    """Votes of several people (a file each) -> {question: {"people", "votes", "pairs", "tuned", "equal",
    "base", "rate", "low", "high"}}.

    rate: how often tuned is preferred, a tie counting half; the interval takes the pairs as the sample, since
    votes on one pair are not independent. InputError for files of different pages.
    """
    files = {path: read_votes(path) for path in paths}
    studies = {vote[0] for votes in files.values() for vote in votes}
    if len(studies) > 1:
        raise InputError(f"{', '.join(map(str, paths))}: votes on different pages; give those of one")
    found = {}
    for question in QUESTIONS:
        scores, counts, people = {}, dict.fromkeys(SCORES, 0), 0
        for votes in files.values():
            latest = {pair: preferred for _, pair, asked, preferred in votes if asked == question}
            people += bool(latest)
            for pair, preferred in latest.items():
                scores.setdefault(pair, []).append(SCORES[preferred])
                counts[preferred] += 1
        if scores:
            rate = float(np.mean([np.mean(values) for values in scores.values()]))
            low, high = wilson(rate, len(scores))
            found[question] = {"people": people, "votes": sum(counts.values()), "pairs": len(scores),
                               **counts, "rate": rate, "low": low, "high": high}
    return found


def main(argv=None):
    """Write the page of a run, or print the win rates of the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("paths", nargs="+", metavar="RUN or votes.csv",
                        help="one or two finished runs; or CSV files that the page exported, one a person")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of a page (default 20)")
    args = parser.parse_args(argv)
    votes = [path for path in args.paths if path.endswith(".csv")]
    if len(votes) == len(args.paths):
        print_votes(votes)
    elif votes or len(args.paths) > 2 or args.pairs < 1:
        raise InputError(f"{' '.join(args.paths)}: name one run or two with --pairs of at least 1, or "
                         "files of votes alone")
    else:
        print(f"  {write_pairs(args.paths[0], args.pairs, *args.paths[1:])}: open it in a browser")


def print_votes(paths):
    """Print the win rates, a line for each question."""
    for question, row in win_rates(paths).items():
        print(f"{question:8s} tuned preferred in {row['rate']:.1%} (95 % interval {row['low']:.1%} to "
              f"{row['high']:.1%}): {row['tuned']} for tuned, {row['equal']} equal, {row['base']} for the "
              f"base; {row['votes']} votes of {row['people']} on {row['pairs']} pairs")


if __name__ == "__main__":
    runs.run_main(main)
