"""Wrong algorithms that the tests must notice, in every script that holds the code.

A mutant is a script with a piece of its text replaced. It is loaded as a module, and one of the named tests
has to fail with it. Sync markers are taken out before, so none of this rests on the comparison of copies. A
piece that is not found fails too: whoever changes a line here changes its mutant.

A test that is named here lives in test_shared.py and takes the script's module, or in the script's own file,
test_ddpo.py for ddpo, and uses its global `ddpo`.
"""
import importlib.util
import inspect
import sys
from typing import NamedTuple

import pytest

from tests import test_shared
from tests.run_helpers import ROOT
from tests.test_sync import BLOCKS, MARK

pytestmark = pytest.mark.usefixtures("one_thread")


class Mutant(NamedTuple):
    name: str
    scripts: tuple
    old: str            # stands once in the script
    new: str
    killers: dict       # name of a test -> the arguments of its parametrisation


def of(scripts, *rows):
    """Mutants of the same scripts from rows (name, old, new, killer or {killer: arguments})."""
    return [Mutant(name, scripts, old, new, {killer: {}} if isinstance(killer, str) else killer)
            for name, old, new, killer in rows]


MEANS = {"test_one_forward_over_all_steps_gives_the_rollouts_own_means": {"order": 2, "guidance": 1.0}}

MUTANTS = [
    *of(BLOCKS["denoiser"], (
        "attention sees padding", "attn_mask=mask)", "attn_mask=None)", "test_padding_is_not_seen"), (
        "padding is not zero", "self.project_out(self.norm(h)) * mask[..., None]",
        "self.project_out(self.norm(h))", "test_padding_is_not_seen"), (
        "dropout in one of two passes", "self.down(F.gelu(self.up(self.norm_ff(x))))",
        "self.down(F.dropout(F.gelu(self.up(self.norm_ff(x))), 0.1, torch.is_grad_enabled()))",
        "test_one_function_in_every_mode"), (
        "no time", "h = h + self.time(", "h = h + 0 * self.time(", "test_time_place_and_words_are_felt"), (
        "dropped captions are seen", "return text, torch.where(dropped[:, None], first[None], text_mask)",
        "return text, text_mask", "test_no_caption_is_one_token")),
    *of(BLOCKS["predict"], (
        "guidance from the wrong side", "* (answer - null)", "* (null - answer)",
        "test_guidance_uses_text_and_null_with_the_stated_weights"), (
        "guidance from the answer", "return null + policy", "return answer + policy",
        "test_guidance_uses_text_and_null_with_the_stated_weights")),
    *of(BLOCKS["strongest"], (
        "the weakest", "argsort(descending=True", "argsort(descending=False",
        "test_strongest_advantages_are_kept_whatever_their_sign"), (
        "the best only", "advantages.abs().argsort", "advantages.argsort",
        "test_strongest_advantages_are_kept_whatever_their_sign")),
    *of(("ddpo",), (
        "sign of the advantage", "centred = rewards - rewards.mean(1, keepdim=True)",
        "centred = rewards.mean(1, keepdim=True) - rewards",
        "test_advantages_use_each_prompts_own_mean_and_one_std"), (
        "baseline across prompts", "rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()",
        "test_advantages_use_each_prompts_own_mean_and_one_std"), (
        "sign of the loss", "unclipped = -advantages", "unclipped = advantages",
        "test_clipped_loss_is_pessimistic"), (
        "minimum for maximum", "torch.maximum(", "torch.minimum(", "test_clipped_loss_is_pessimistic"), (
        "sum for mean", " / (mask.sum(-1) * y.shape[-1])", "",
        "test_logp_is_the_mean_over_valid_entries_and_detached"), (
        "padding counts", "(y * mask[..., None]).sum", "y.sum",
        "test_logp_is_the_mean_over_valid_entries_and_detached"), (
        "action with a gradient", "(x.detach() - mean)", "(x - mean)",
        "test_logp_is_the_mean_over_valid_entries_and_detached"), (
        "padding of states is not zero", "noise[:, i + 1]) * mask[..., None]", "noise[:, i + 1])",
        "test_padding_changes_nothing_that_is_valid"), (
        "timestep off by one", "steps.timesteps[:s].float()", "steps.timesteps[1:s + 1].float()", MEANS), (
        "noise off by one", "noise[:, i + 1]) *", "noise[:, i]) *", MEANS), (
        "guess of the wrong step", "torch.cat([m[:, :1], m[:, :-1]], 1)", "m", MEANS), (
        "action of the wrong step", "states[:, 1:s + 1]", "states[:, :s]",
        "test_policy_gradient_equals_the_gradient_of_the_expected_reward"), (
        "last step is trained", "args.steps - args.skip_last", "args.steps",
        "test_training_moves_the_adapters_only"), (
        "base is trained", "    parameters = lora.parameters(policy.model)\n",
        "    parameters = [p.requires_grad_() for p in policy.model.parameters()]\n",
        "test_training_moves_the_adapters_only"), (
        "sign of the KL", "loss + args.kl_coef * kl", "loss - args.kl_coef * kl",
        "test_a_step_of_the_kl_alone_goes_back_to_the_base"), (
        "KL to the policy itself", "with lora.scaled(policy.model, 0.0):      #",
        "with lora.scaled(policy.model, 1.0):      #", "test_a_step_of_the_kl_alone_goes_back_to_the_base"), (
        "no old policy", "logratio = logp - logp_old[rows]", "logratio = logp - logp.detach()",
        "test_later_minibatches_know_the_old_policy"), (
        "advantages in another order", 'advantages[batch["numbers"]]', 'advantages[batch["numbers"][::-1]]',
        "test_advantages_stay_with_their_samples"), (
        "captions in another order", 'captions = [batch["captions"][row] for row in rows]',
        'captions = batch["captions"][:len(rows)]', "test_advantages_stay_with_their_samples"), (
        "rewards in another order", "reward(motion, lengths, batch[\"captions\"],",
        "reward(motion, lengths, batch[\"captions\"][::-1],", "test_rewards_stay_with_their_samples"), (
        "groups across prompts", 'rearrange(rewards, "(p g) -> p g"', 'rearrange(rewards, "(g p) -> p g"',
        "test_each_group_holds_one_prompt"), (
        "captions of other groups", "captions, lengths = [chosen[p] for p in groups], lengths[groups]",
        "captions, lengths = [chosen[p] for p in reversed(groups)], lengths[groups]",
        "test_samples_are_those_of_their_prompts")),
]
GRADIENT = {"test_an_update_is_the_gradient_of_both_losses": {"micro": 3}}
MUTANTS += [
    *of(BLOCKS["ppo"], (
        "sign of the penalty", "-kl_coef * (logp_old - logp_ref)", "kl_coef * (logp_old - logp_ref)",
        "test_token_rewards_by_hand"), (
        "reward at the wrong token", "mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) - 2",
        "test_token_rewards_by_hand"), (
        "value of the wrong state", "gamma * following[:, t] - values[:, t]",
        "gamma * values[:, t] - values[:, t]", "test_gae_is_the_weighted_sum_of_one_step_errors"), (
        "values behind the end", "F.pad(values * mask, (0, 1))", "F.pad(values, (0, 1))",
        "test_gae_is_the_weighted_sum_of_one_step_errors"), (
        "whitened over padding", "all_gather_rows(advantages[mask])", "all_gather_rows(advantages)",
        "test_whitening_is_over_the_valid_tokens_of_all_processes"), (
        "sign of the loss", "unclipped = -advantages", "unclipped = advantages",
        "test_token_loss_is_pessimistic"), (
        "minimum for maximum", "torch.maximum(unclipped", "torch.minimum(unclipped",
        "test_token_loss_is_pessimistic"), (
        "sign of the value loss", "0.5 * (values - returns).square()", "-0.5 * (values - returns).square()",
        "test_value_loss_pulls_to_the_returns"), (
        "KL of the wrong direction", "kl[rows] = (logps.exp() * (logps - logps_ref))",
        "kl[rows] = (logps_ref.exp() * (logps_ref - logps))", "test_rollouts_are_scored_by_hand"), (
        "reference is the policy", "score_actions(policy.reference, None", "score_actions(policy.gpt, None",
        "test_rollouts_are_scored_by_hand"), (
        "padding is trained", "(pg * share).sum()", "pg.sum()", GRADIENT), (
        "padding is valued", "(value_loss(values, returns) * mask).sum()",
        "value_loss(values, returns).sum()", GRADIENT), (
        "sum for mean", "pg = (pg * share).sum() / (weight or 1.0)", "pg = (pg * share).sum()", GRADIENT), (
        "no old policy", "torch.where(mask, logp - logp_old, 0.0)",
        "torch.where(mask, logp - logp.detach(), 0.0)", GRADIENT), (
        "critic by its own factor", "pg + VF_COEF * vf", "pg + vf", GRADIENT)),
    *of(BLOCKS["policy"], (
        "no temperature", "torch.float32)) / temperature", "torch.float32))",
        "test_actions_are_scored_as_they_were_drawn"), (
        "early ends", "masked_fill(early[:, None] & end, -math.inf)",
        "masked_fill(early[:, None] & end & False, -math.inf)",
        "test_actions_are_scored_as_they_were_drawn"), (
        "a token sees itself", "gpt(tokens[:, :-1], text)", "gpt(tokens[:, 1:], text)",
        "test_actions_are_scored_as_they_were_drawn"), (
        "draws of another token", "pick(logits[:, 0], uniform[:, t])", "pick(logits[:, 0], uniform[:, 0])",
        "test_actions_are_scored_as_they_were_drawn")),
    *of(BLOCKS["gpt"], (
        "critic bends the policy", "hidden = hidden.detach()", "hidden = hidden", GRADIENT), (
        "later tokens are seen", "scores.masked_fill(later, -math.inf)", "scores.masked_fill(later, 0.0)",
        "test_actions_are_scored_as_they_were_drawn")),
    *of(BLOCKS["margin"], (
        "matched and mismatched swapped", "torch.where(negative, (margin", "torch.where(~negative, (margin",
        "test_margin_loss_by_hand")),
]
CASES = [pytest.param(mutant, script, id=f"{script}-{mutant.name.replace(' ', '_')}")
         for mutant in MUTANTS for script in mutant.scripts]


def mutated(script, old, new, tmp_path, monkeypatch):
    """The module of a script with one piece of its text replaced."""
    source = MARK.sub("", (ROOT / f"{script}_motion.py").read_text(encoding="utf-8"))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {script}_motion.py"
    path = tmp_path / f"{script}_motion.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{script}_mutant", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def file_of(script):
    """The module that holds a script's own tests."""
    return importlib.import_module(f"tests.test_{script}")


def run(name, script, module, arguments, tmp_path):
    """Call a test with a module in place of the script."""
    home = test_shared if hasattr(test_shared, name) else file_of(script)
    test, folder = getattr(home, name), tmp_path / "run of the test"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        if home is not test_shared:
            patch.setattr(home, script, module)
        known = {"script": module, "tmp_path": folder, "monkeypatch": patch, **arguments}
        test(**{name: known[name] for name in inspect.signature(test).parameters})


@pytest.mark.parametrize("mutant, script", CASES)
def test_a_mutant_dies(mutant, script, tmp_path, monkeypatch):
    module = mutated(script, mutant.old, mutant.new, tmp_path, monkeypatch)
    for number, (name, arguments) in enumerate(mutant.killers.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            run(name, script, module, arguments, folder)
        except (Exception, pytest.fail.Exception):
            return
    pytest.fail(f"{script} with {mutant.name} passes {', '.join(mutant.killers)}")


KILLERS = sorted({(script, name, tuple(arguments.items())) for mutant in MUTANTS for script in mutant.scripts
                  for name, arguments in mutant.killers.items()})


@pytest.mark.parametrize("script, name, arguments", KILLERS)
def test_what_kills_mutants_lets_the_script_live(script, name, arguments, tmp_path, monkeypatch):
    """The same calls pass with the script as it is: a mutant dies of its fault, not of how it is called."""
    module = mutated(script, "import torch\n", "import torch\n", tmp_path, monkeypatch)
    run(name, script, module, dict(arguments), tmp_path)
