"""Studies: a script with one of its functions replaced.

  python -m results.studies NAME [flags of the script]   # a run, in runs/ddpo_NAME_kit_seed0 ...
  python -m results.studies NAME RUN [flags]             # of a finished run: references, strengths
"""
import argparse
import contextlib
import io
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import ddpo_motion
import pareto_motion
import ppo_motion
import stepwise_motion
from common import InputError, diffusion, evaluate, motion_reward, render, retrieval, runs
from results import tables

# ---- 1. How a study is made ----------------------------------------------------------------------


@contextlib.contextmanager
def replaced(module, name, value):
    """`with replaced(module, "function", mine):` -- inside, the module has another one."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def named(study, argv):
    """Inside, a script's run says that it is a study: by its folder, and in results.json."""
    usual = runs.prepare

    def prepare(cls, sizes, words, description, method, *rest, **more):
        start = usual(cls, sizes, words, description, f"{method}_{study}", *rest, **more)
        return start._replace(command=f"python -m results.studies {study} {' '.join(argv)}".strip())
    return replaced(runs, "prepare", prepare)


def with_reward(build, argv):
    """ddpo_motion.py with build(args, domains, **options) -> reward, notes. domains: those that a
    reward model may learn from, which --reward-data says."""
    def build_reward(args, source, target, **options):
        seen = [source] if args.reward_data == "source" else [source, target]
        return build(args, seen, target=target, **options)
    with replaced(ddpo_motion, "build_reward", build_reward):
        ddpo_motion.main(argv)


# ---- 2. Runs of a script -------------------------------------------------------------------------


class PromptTracker:
    """Advantages from the last `buffer_size` rewards of each prompt (DDPO code, ddpo-pytorch).

    Prompts with fewer than `min_count` known rewards use mean and std of the batch.
    """

    def __init__(self, buffer_size, min_count):
        self.buffer_size, self.min_count, self.rewards = buffer_size, min_count, {}

    def update(self, prompts, rewards):
        """prompts (b), rewards (b) -> advantages (b) float64; the new rewards count already."""
        prompts, rewards = list(prompts), np.asarray(rewards, dtype=np.float64)
        for prompt in dict.fromkeys(prompts):
            new = [float(r) for p, r in zip(prompts, rewards) if p == prompt]
            self.rewards[prompt] = (self.rewards.get(prompt, []) + new)[-self.buffer_size:]
        advantages = np.empty_like(rewards)
        for n, prompt in enumerate(prompts):
            seen = self.rewards[prompt]
            known = seen if len(seen) >= self.min_count else rewards
            advantages[n] = (rewards[n] - np.mean(known)) / (np.std(known) + 1e-6)
        return advantages

    def advantages(self, rewards, captions):
        """rewards (p g), captions (list of p) -> advantages (p g): what ddpo_motion.main takes."""
        prompts = [caption for caption in captions for _ in range(rewards.shape[1])]
        found = torch.from_numpy(self.update(prompts, rewards.flatten().numpy()))
        return found.float().clamp(-ddpo_motion.ADV_CLIP, ddpo_motion.ADV_CLIP).view_as(rewards)


def tracker(argv):
    """The baseline is that of the DDPO code: statistics of every prompt over iterations."""
    if "--resume" in argv:
        raise InputError("--resume: the statistics of the tracker are not saved; start anew")
    ddpo_motion.main(argv, advantages=PromptTracker(buffer_size=32, min_count=16).advantages)


def contrastive(argv):
    """The reward also counts how badly a motion fits all other captions, as in InfoNCE."""
    def build(args, domains, target, **options):
        model, notes = retrieval.reward_model(domains, target=target, **options)
        captions = sorted({c for clip in target.splits["train"] for c in clip.captions})
        others = torch.nn.functional.normalize(model.embed_text(captions), dim=-1)  # m c

        def reward(motion, lengths, captions):
            seen, asked = retrieval.embed(model, motion, lengths, captions)         # b c
            return (seen * asked).sum(-1) - 0.1 * torch.logsumexp(seen @ others.T / 0.1, -1)
        return reward, notes
    with_reward(build, argv)


def two_families(argv):
    """The reward is the mean of two reward models of different families."""
    def build(args, domains, **options):
        first, notes = retrieval.reward_model(domains, **options)
        second, more = retrieval.reward_model(domains, family="bigru", number=2, **options)

        def reward(motion, lengths, captions):
            both = [model.similarity(motion, lengths, captions) for model in (first, second)]
            return torch.stack(both).mean(0)
        return reward, {"transformer": notes, "bigru": more}
    with_reward(build, argv)


def other_family(argv):
    """The reward model is of the family of the judge, a bidirectional GRU."""
    def build(args, domains, **options):
        model, notes = retrieval.reward_model(domains, family="bigru", **options)
        return model.similarity, notes
    with_reward(build, argv)


def motion_reward_of_stepwise(argv):
    """ddpo_motion.py is rewarded by MotionReward of stepwise_motion.py, without its heads."""
    def build(args, domains, **options):
        schedule = motion_reward.TRAINING[args.size]._replace(head_iterations=0)
        model, notes = motion_reward.fit_motion_reward(
            domains, None, stepwise_motion.LOSSES, schedule, saw=[], **options)
        weights = {"semantic": 1.0}
        return partial(stepwise_motion.weighted_reward, model, "features", weights), notes
    with_reward(build, argv)


def long_base(argv):
    """The base is trained twice as long."""
    usual = diffusion.fit_base

    def fit_base(make_model, parts, source, size, *rest, **options):
        size = size._replace(iterations=2 * size.iterations)
        return usual(make_model, parts, source, size, *rest, **options)
    with replaced(diffusion, "fit_base", fit_base):
        ddpo_motion.main(argv)


def update_accum(argv):
    """stepwise_motion.py updates once a walk, by the sum of the gradients of all its steps."""
    def learn(loss, last, **more):
        if last:
            return stepwise_motion.learn(loss, last, **more)
        loss.backward()  # adds to the gradients that are there
    stepwise_motion.main(argv, learn=learn)


def update_chain(argv):
    """stepwise_motion.py updates after a walk, by the gradient of one step after another."""
    kept = []            # of the weights at the start of the walk ([ME] has a second copy of them)

    def learn(loss, last, optimizer, **more):
        parameters = optimizer.param_groups[0]["params"]
        loss.backward()
        kept.append([p.grad for p in parameters])
        optimizer.zero_grad()
        if not last:
            return None
        norms = []
        for gradients in kept:
            # The gradient of this sum is the one that was kept, to the last bit.
            loss = sum((p * g).sum() for p, g in zip(parameters, gradients) if g is not None)
            norms.append(stepwise_motion.learn(loss, last, optimizer=optimizer, **more))
        kept.clear()
        return sum(norms) / len(norms)
    stepwise_motion.main(argv, learn=learn)


# ---- 3. Of finished runs -------------------------------------------------------------------------

SCRIPTS = {"ddpo-adapter": ddpo_motion, "stepwise-adapter": stepwise_motion, "ppo-policy": ppo_motion,
           "pareto-policy": pareto_motion}


def product_of(run):
    """The script of a finished run, and the file that its --load reads; InputError without one."""
    for kind, script in SCRIPTS.items():
        path = Path(run) / f"{kind.partition('-')[2]}.pt"
        with contextlib.suppress(InputError):  # a product says in it which script has made it
            runs.load_checkpoint(path, kind=kind)
            return script, path
    raise InputError(f"{run}: no adapter.pt or policy.pt that can be read; name a finished run")


def reopen(run, flags=()):
    """A finished run, put together again by the main() of its script, with --eval-only.

    -> its script, args and policy; what its pictures show: clips, scorers and samplers (before,
    after); and source and target, of a script that uses evaluate.final_tables. flags of the script.
    """
    script, path = product_of(run)
    result, = tables.read_results([run])
    found, load = SimpleNamespace(script=script, result=result), script.load_policy
    study = tables.program_of(result)[0].partition("results.studies ")[2]

    def load_policy(args, stored, device):
        found.args, found.policy = args, load(args, stored, device)
        return found.policy

    def final_tables(source, target, *rest):
        found.source, found.target = source, target
        return {}

    def draw(folder, clips, scorers, samplers, *rest):
        found.clips, found.scorers, found.samplers = clips, scorers, samplers
    kept = {name: result["args"][name] for name in ("data_root", "cache_dir", "eval_repeats")}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in kept.items()]
    with contextlib.ExitStack() as changed:
        folder = changed.enter_context(tempfile.TemporaryDirectory())
        changed.enter_context(contextlib.redirect_stdout(io.StringIO()))
        changed.enter_context(replaced(script, "load_policy", load_policy))
        changed.enter_context(replaced(evaluate, "final_tables", final_tables))
        changed.enter_context(replaced(evaluate, "compare", lambda *given, **options: {}))
        changed.enter_context(replaced(evaluate, "draw", draw))
        again = STUDIES[study] if study else script.main
        again(["--eval-only", f"--load={path}", *argv, *flags, "--out-dir", folder])
    return found


def opened_by(argv, study):
    """The finished ddpo run that the command line names first, reopened -> its folder, and what
    `reopen` gives."""
    if not argv or argv[0].startswith("-"):
        raise InputError(f"{study}: name a finished run of ddpo_motion.py first")
    found = reopen(argv[0], argv[1:])
    if found.script is not ddpo_motion:
        raise InputError(f"{argv[0]}: not a run of ddpo_motion.py")
    return Path(argv[0]), found


def references(argv):
    """A table of a finished run with one more row: a base trained on motion of the target."""
    folder, run = opened_by(argv, "references")
    args, device = run.args, run.policy.device
    parts = (ddpo_motion.sinusoid, ddpo_motion.Attention, ddpo_motion.Layer,
             ddpo_motion.MotionDiffusion)
    model, _ = diffusion.fit_base(
        partial(ddpo_motion.make_model, args), parts, run.target,
        diffusion.SIZES[args.space][args.size], *diffusion.SPACES[args.space],
        seed=args.base_seed, device=device, cache_dir=args.cache_dir, use_cache=args.cache)
    longest = max(run.source.longest, run.target.longest)
    other = ddpo_motion.make_policy(args, model, longest, device)
    samplers = {"base": run.samplers["before"], "tuned": run.samplers["after"],
                "target base": ddpo_motion.policy_sampler(args, other, 0.0)}
    table = evaluate.compare("target_test", run.clips, run.scorers, samplers,
                             repeats=args.eval_repeats)
    runs.save_json(folder / "references.json", {"target_test": table})


STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # past 1 is what no training has asked for


def strength_curve(path, source, target, scorers, sampler_at):
    """Reward, judge and oracle on both test splits with the adapters at STRENGTHS, one repeat each,
    drawn as `path` -> {column: list}. sampler_at(strength) -> sampler."""
    names, log = ("reward", "judge", "oracle"), {"strength": list(STRENGTHS)}
    for strength in tqdm(STRENGTHS, desc="strengths"):
        for title, domain in (("target", target), ("source", source)):
            row = evaluate.evaluate(domain.splits["test"], scorers, sampler_at(strength),
                                    purpose=f"{title}_test", compare_with_data=False)
            for name in names:
                log.setdefault(f"{title}_{name}", []).append(row[name][0])
    groups = [(f"target_{name}", f"source_{name}") for name in names]
    columns = {name: np.array(values) for name, values in log.items()}
    render.safely(render.curves, path, columns, groups, "strength")
    return log


def strengths(argv):
    """Reward, judge and oracle of a finished run, its adapters at 0 to 1.25 of their strength."""
    folder, run = opened_by(argv, "strengths")
    log = strength_curve(folder / "strengths.png", run.source, run.target, run.scorers,
                         partial(ddpo_motion.policy_sampler, run.args, run.policy))
    runs.save_json(folder / "strengths.json", log)
    rows = [[f"{value:.3f}" for value in row] for row in zip(*log.values())]
    print(tables.markdown(list(log), rows))


# ---- 4. Command line -----------------------------------------------------------------------------

STUDIES = {"tracker": tracker, "contrastive": contrastive, "two-families": two_families,
           "other-family": other_family, "motion-reward": motion_reward_of_stepwise,
           "long-base": long_base, "update-accum": update_accum, "update-chain": update_chain,
           "references": references, "strengths": strengths}


def main(argv=None):
    """Run the study that is named first, with the flags that follow."""
    argv = sys.argv[1:] if argv is None else argv
    lines = [f"  {name:15s}{study.__doc__}" for name, study in STUDIES.items()]
    parser = argparse.ArgumentParser(description=f"{__doc__}\nstudies\n" + "\n".join(lines),
                                     formatter_class=runs.Help, usage="%(prog)s NAME ...")
    parser.add_argument("name", choices=STUDIES, metavar="NAME", help="one of the above")
    name = parser.parse_args(argv[:1]).name
    with named(name, argv[1:]):
        STUDIES[name](argv[1:])


if __name__ == "__main__":
    runs.run_main(main)
