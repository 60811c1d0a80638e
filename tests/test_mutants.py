"""Wrong algorithms that the tests must notice, in every script that holds the code.

A mutant is a script with a piece of its text replaced. It is loaded as a module, and one of the named tests
has to fail with it. Sync markers are taken out before, so none of this rests on the comparison of copies. A
piece that is not found fails too: whoever changes a line here changes its mutant.

A test that is named here lives in test_shared.py and takes the script's module, or in the script's own file,
test_ddpo.py for ddpo, which imports the script as a global.
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
        "sum for mean", "pg = (pg * share).sum() / (shares or 1.0)", "pg = (pg * share).sum()", GRADIENT), (
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
MUTANTS += [
    *of(("ppo",), (
        "sign of the text term", "return -lambda_t * text", "return lambda_t * text",
        "test_reward_by_hand"), (
        "sign of the motion term", "= -lambda_m * motion", "= lambda_m * motion", "test_reward_by_hand"), (
        "no pseudo score", "motion_term, pseudo), pseudo", "motion_term, 0.0), pseudo",
        "test_reward_by_hand"), (
        "pseudo score of all", "motion_term[paired].mean()", "motion_term.mean()", "test_reward_by_hand"), (
        "distance, not squared", "(f_text - f_motion).square().sum(-1)", "(f_text - f_motion).norm(dim=-1)",
        "test_reward_by_hand"), (
        "paired clips of others", "(encoders, motion, lengths, captions, clips)\n    paired",
        "(encoders, motion, lengths, captions, clips[::-1])\n    paired",
        "test_rewards_stay_with_their_samples"), (
        "groups across prompts", "groups - groups.mean(1, keepdim=True)", "groups - groups.mean()",
        "test_merit_by_hand")),
    *of(("pareto",), (
        "better in all instead of none worse", "(other >= mine).all(-1)", "(other > mine).all(-1)",
        "test_equal_motions_stay_and_a_tie_in_one_reward_saves_nobody"), (
        "equal motions beat each other", " & (other > mine).any(-1)).any(-1)", ").any(-1)",
        "test_equal_motions_stay_and_a_tie_in_one_reward_saves_nobody"), (
        "the beaten stay", "(other >= mine).all(-1) & (other > mine)",
        "(other <= mine).all(-1) & (other < mine)",
        {"test_nondominated_by_enumeration": {"n": 16, "k": 3}}), (
        "fronts across tokens", "keep = nondominated(R)\n",
        'keep = nondominated(R.transpose(1, 2)).transpose(1, 2)\n',
        "test_sets_are_of_one_prompt_and_one_token"), (
        "reward of another token", 'dim1=1, dim2=3), "p n c -> p c n")',
        'dim1=1, dim2=3), "p n c -> p c n").flip(1)',
        "test_own_reward_is_that_of_the_token"), (
        "baseline across prompts", "(r * counted).sum(2, keepdim=True) / count", "(r * counted).sum() / 24",
        "test_standardise_by_hand"), (
        "rewards of other captions", 'batch["lengths"], batch["captions"], batch["clips"])\n    for name',
        'batch["lengths"], batch["captions"][::-1], batch["clips"])\n    for name',
        "test_rewards_stay_with_their_samples"), (
        "weight of one", "return keep, keep / keep.sum(dims, keepdim=True)", "return keep, keep / 1.0",
        "test_weights_are_one_over_the_size_of_the_set")),
    *of(("stepwise",), (
        "timestep off by one", "float(policy.steps.timesteps[i])", "float(policy.steps.timesteps[i - 1])",
        "test_the_network_is_told_the_time_of_its_step"), (
        "base is trained", "args.lora_alpha, g)\n",
        "args.lora_alpha, g)\n        model.requires_grad_(True)\n",
        {"test_the_base_stays_and_its_weights_can_be_stored": {"rank": 8}}), (
        "rewards of other captions", 'batch["asked"], **batch["more"]',
        'batch["asked"][::-1], **batch["more"]',
        "test_rewards_stay_with_their_samples"), (
        "the state is not stopped", "x = x_next.detach() if route.stop_state else x_next", "x = x_next",
        "test_a_step_of_easytune_is_refl_of_that_step"), (
        "the input is not stopped", "read = x.detach() if route.stop_input else x", "read = x",
        "test_drtune_is_a_weighted_sum_over_steps"), (
        "sign of the reward", "loss = -rewards.mean()", "loss = rewards.mean()",
        "test_updates_raise_the_reward_and_the_anchor_goes_back_to_the_base"), (
        "sign of the anchor", "loss + args.anchor * anchor", "loss - args.anchor * anchor",
        "test_updates_raise_the_reward_and_the_anchor_goes_back_to_the_base"), (
        "padding is anchored", "* mask[..., None]).sum((1, 2))", ").sum((1, 2))",
        "test_the_anchor_counts_real_tokens_only"), (
        "the step before is rewarded", "visit(i, p * x + q * e if", "visit(i, x if",
        "test_a_step_of_easytune_is_refl_of_that_step"), (
        "what is found is mined", "(top != own).all(1), top", "(top == own).any(1), top",
        "test_spl_by_hand")),
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


def home_of(name, script):
    """The module that holds a test: shared tests, the script's own, or those of its reward model."""
    files = ("test_shared", f"test_{script}", "test_motion_reward")
    homes = [importlib.import_module(f"tests.{file}") for file in files]
    return next(home for home in homes if hasattr(home, name))


def run(name, script, module, arguments, tmp_path):
    """Call a test with a module in place of the script."""
    home = home_of(name, script)
    test, folder = getattr(home, name), tmp_path / "run of the test"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        if home is not test_shared:
            original = importlib.import_module(f"{script}_motion")
            own = next(key for key, value in vars(home).items() if value is original)
            patch.setattr(home, own, module)
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
