"""Compare tokenizer, GPT and the PPO formulas with reference arrays (see tests/parity).

The reference values of T2M-GPT were made with random weights of the published network classes, so our classes
must load them as they are.
"""
import numpy as np
import torch
from einops import rearrange

from common import published, retrieval, tokenizer
from common.published import t2m_gpt
from tests.parity.rows import Rows


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    with np.load(path) as stored:
        ref = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "meta_json"}
    result, name = Rows(), path.name
    kinds = {"t2mgpt_vq_ema": check_codebook, "t2mgpt_vq": check_tokenizer, "t2mgpt_trans": check_gpt,
             "ppo_math": check_math, "ppo_extra": check_extra, "tm_reward": check_rewards}
    kinds[next(kind for kind in kinds if name.startswith(kind))](result, ref)
    return result.rows()


def check_tokenizer(result, ref):
    """VQVAE of common/tokenizer.py with the published names of weights."""
    state = {key.removeprefix("sd/vqvae."): value for key, value in ref.items() if key.startswith("sd/")}
    vq = tokenizer.VQVAE(**t2m_gpt.tokenizer_sizes(state, "reference"))
    published.load_strict(vq, state, "reference", free=("mean", "std"))
    motion = ref["motion"]
    lengths = torch.full((len(motion),), motion.shape[1])
    latents, counts = vq.encode(motion, lengths)
    result.compare("encoder_out", latents, ref["encoder_out"], 1e-5)
    codes = vq.nearest(latents)
    result.compare("idx", codes, ref["idx"], 0)
    short, _ = vq.tokenise(motion[:, :22], lengths - (motion.shape[1] - 22))
    result.compare("idx_T22", short, ref["idx_T22"], 0)
    vectors = vq.quantizer.codebook[codes]
    recon = vq.reconstruct(latents + (vectors - latents).detach(), counts)
    result.compare("recon", recon, ref["recon"], 1e-5)
    tokens = ref["decode_in"]
    decoded, _ = vq.decode(tokens, torch.full((len(tokens),), tokens.shape[1]))
    result.compare("decode_out", decoded, ref["decode_out"], 1e-5)
    joints = {263: 22, 251: 21}[motion.shape[2]]
    positions = slice(4, 4 + 3 * (joints - 1))
    parts = tokenizer.vq_loss_parts(motion, recon, latents, vectors, counts, positions)
    for field, part in zip(("loss_rec", "loss_vel", "loss_commit"), parts):
        result.compare(field, part, ref[field], 1e-6)
    loss = tokenizer.vq_loss(*parts)
    result.compare("loss_total", loss, ref["loss_total"], 1e-6)
    result.compare("perplexity", tokenizer.perplexity(codes.flatten(), len(vq.quantizer.codebook)),
                   ref["perplexity"], 1e-5)
    loss.backward()
    gradients = dict(vq.named_parameters())
    for key, value in ref.items():
        if key.startswith("grad/"):
            result.compare("gradients", gradients[key.removeprefix("grad/vqvae.")].grad, value, 1e-5)


def check_codebook(result, ref):
    """Three training batches of the quantiser; dead codes take the first rows, as the public code does."""
    first = rearrange(ref["step0/x"], "b c n -> (b n) c")[: len(ref["codebook_init"])]
    result.compare("codebook_init", first, ref["codebook_init"], 0)
    vq = tokenizer.VQVAE(1, 1, ref["codebook_init"].shape[1], len(first), 1)
    book = tokenizer.EMACodebook(vq.quantizer.codebook, first)
    for step in range(sum(key.endswith("/x") for key in ref)):
        part = {key.partition("/")[2]: value for key, value in ref.items() if key.startswith(f"step{step}/")}
        x = rearrange(part["x"], "b c n -> b n c").requires_grad_()
        result.compare("codebook_before", vq.quantizer.codebook, part["codebook_before"], 1e-6)
        codes = vq.nearest(x)
        result.compare("idx", codes, part["idx"], 0)
        vectors = vq.quantizer.codebook[codes]
        through = x + (vectors - x).detach()
        result.compare("quantized", rearrange(through, "b n c -> b c n"), part["quantized"], 1e-6)
        commit = (x - vectors).square().mean()
        result.compare("commit", commit, part["commit"], 1e-6)
        (through.sum() + commit).backward()
        result.compare("grad_x_of_sum_plus_commit", rearrange(x.grad, "b n c -> b c n"),
                       part["grad_x_of_sum_plus_commit"], 1e-6)
        used = tokenizer.perplexity(codes.flatten(), len(first))
        result.compare("perplexity", used, part["perplexity"], 1e-5)
        rows = rearrange(x.detach(), "b n c -> (b n) c")
        book.update(rows, codes.flatten(), rows[: len(first)])
        result.compare("codebook_after", vq.quantizer.codebook, part["codebook_after"], 1e-6)
        result.compare("code_sum_after", book.sums, part["code_sum_after"], 1e-6)
        result.compare("code_count_after", book.counts, part["code_count_after"], 1e-6)


def check_gpt(result, ref):
    """MotionGPT of ppo_motion.py: whole sequences, cached decoding, losses, gradients."""
    import ppo_motion as ppo

    state = {key.removeprefix("sd/"): value for key, value in ref.items() if key.startswith("sd/")}
    table = state["trans_base.pos_embed.embed"]
    state = {key: value for key, value in state.items() if not published.NO_WEIGHTS.search(key)}
    gpt = ppo.MotionGPT(**t2m_gpt.gpt_sizes(state, "reference", 4, len(table)))
    published.load_strict(gpt, state, "reference")
    result.compare("positions", gpt.positions, table[:, 0], 1e-6)
    prefix, text = ref["prefix"], ref["text_feature"][: len(ref["prefix"])]
    logits, hidden = gpt(prefix, text)
    result.compare("logits", logits, ref["logits"], 1e-5)
    result.compare("base_hidden", hidden, ref["base_hidden"], 1e-5)
    result.compare("logits_empty", gpt(prefix[:, :0], text)[0], ref["logits_empty"], 1e-5)
    result.compare("logits_prefix4", gpt(prefix[:, :4], text)[0], ref["logits_prefix4"], 1e-5)
    cache = {}
    steps = [gpt(prefix[:, :t], text, cache)[0] for t in range(prefix.shape[1] + 1)]
    result.compare("logits (cached)", torch.cat(steps, 1), ref["logits"], 1e-5)
    for field, temperature in (("logp_temp1", 1.0), ("logp_temp1p5", 1.5)):
        answer = logits, None
        logp, _, _ = ppo.score_actions(lambda *asked: answer, None, ref["actions"], None, 0, temperature)
        result.compare(field, logp, ref[field], 1e-5)
    tokens, lengths = greedy(ppo, gpt, ref["text_feature"], ref["greedy_tokens"].shape[1])
    result.compare("greedy_len", lengths, ref["greedy_len"], 0)
    result.compare("greedy_tokens", tokens.where(tokens != gpt.end, gpt.pad), ref["greedy_tokens"], 0)
    _, lengths = greedy(ppo, gpt, ref["text_feature_end_first"], 3)
    result.compare("end_first", lengths, torch.zeros_like(lengths), 0)  # the public code raises here
    target, counts = ref["train_target"], ref["train_len"]
    result.compare("loss_clean", tokenizer.sequence_loss(gpt(target[:, :-1], text)[0], target, counts),
                   ref["loss_clean"], 1e-5)
    kept = ref["train_keep"] * target[:, :-1] + (1 - ref["train_keep"]) * ref["train_rand"]
    result.compare("train_input_corrupted", kept, ref["train_input_corrupted"], 0)
    loss = tokenizer.sequence_loss(gpt(kept, text)[0], target, counts)
    result.compare("loss_corrupt", loss, ref["loss_corrupt"], 1e-5)
    loss.backward()
    gradients = dict(gpt.named_parameters())
    for key, value in ref.items():
        if key.startswith("grad_loss_corrupt/"):
            result.compare("gradients", gradients[key.removeprefix("grad_loss_corrupt/")].grad, value, 1e-5)


def greedy(ppo, gpt, text, limit):
    """The rollout at a temperature at which only the largest logit counts, whatever is drawn."""
    return ppo.rollout(gpt, text, torch.full((len(text), limit), 0.5), 0, 1e-6)


def check_math(result, ref):
    """Rewards, advantages and losses on one batch in float64."""
    import ppo_motion as ppo

    beta, clip = 0.05, 0.2  # "params" in the file's notes
    mask = ref["mask"] > 0
    rewards = ppo.token_rewards(ref["score"], ref["old_logp"], ref["ref_logp"], mask, beta)
    result.compare("reward", rewards, ref["reward"], 1e-10)
    result.compare("last_action", mask.sum(1) - 1, ref["last_action"], 0)
    advantages, returns = ppo.gae(rewards, ref["old_value"], mask, 1.0, 0.95)
    result.compare("advantage", advantages, ref["advantage"], 1e-10)
    result.compare("returns", returns, ref["returns"], 1e-10)
    white = ppo.whiten(advantages, mask)
    result.compare("advantage_whitened", white, ref["advantage_whitened"], 1e-10)
    n, logratio = mask.sum(), ref["new_logp"] - ref["old_logp"]
    ratio = logratio.exp()
    pg = (ppo.clipped_loss(ratio, white, clip) * mask).sum() / n
    result.compare("pg_loss", pg, ref["out/pg_loss"], 1e-10)
    plain = (ppo.value_loss(ref["new_value"], returns) * mask).sum() / n
    result.compare("vf_loss_plain", plain, ref["out/vf_loss_plain"], 1e-10)
    gap, clipped = (ratio - 1) - logratio, (ratio - 1).abs() > clip  # as ppo.update logs them
    result.compare("approx_kl", (gap * mask).sum() / n, ref["out/approx_kl_k3"], 1e-10)
    result.compare("clipfrac", (clipped & mask).sum().double() / n, ref["out/clipfrac"], 1e-10)
    kl = ((ref["old_logp"] - ref["ref_logp"]) * mask).sum(1)
    result.compare("kl_to_ref_per_sequence", kl, ref["out/kl_to_ref_per_sequence"], 1e-10)


def check_extra(result, ref):
    """From logits on: temperatures, an empty and a truncated row, a grid of GAE, gradients, MotionRL's
    weights."""
    import pareto_motion as pareto
    import ppo_motion as ppo

    mask, actions = ref["mask"] > 0, ref["actions"]
    taken, every = {}, {}
    for who in ("old", "new", "ref"):
        for name, temperature in (("temp1", 1.0), ("temp1p5", 1.5)):
            answer = ref[f"logits_{who}"], None
            logp, logps, _ = ppo.score_actions(lambda *asked: answer, None, actions, None, 0, temperature)
            result.compare(f"logp_{who}_{name}", logp * mask, ref[f"logp_{who}_{name}"], 1e-10)
            if name == "temp1":
                taken[who], every[who] = logp, logps
    entropy = -(every["new"].exp() * every["new"]).sum(-1) * mask
    result.compare("entropy_new", entropy, ref["entropy_new"], 1e-10)
    for p, q in (("old", "ref"), ("new", "old")):
        kl = (every[p].exp() * (every[p] - every[q])).sum(-1) * mask  # as in ppo.assess
        result.compare(f"kl_full_{p}_{q}", kl, ref[f"kl_full_{p}_{q}"], 1e-10)
    rewards = ppo.token_rewards(ref["score"], taken["old"], taken["ref"], mask, ref["beta"].item())
    result.compare("reward", rewards, ref["reward"], 1e-10)
    for key in [key for key in ref if key.startswith("gae/") and key.endswith("/advantage")]:
        gamma, gae_lambda = (float(part[1:]) for part in key.split("/")[1].split("_"))
        advantages, returns = ppo.gae(rewards, ref["old_value"], mask, gamma, gae_lambda)
        result.compare("gae advantages", advantages, ref[key], 1e-10)
        result.compare("gae returns", returns, ref[key.replace("advantage", "returns")], 1e-10)
    advantages, returns = ppo.gae(rewards, ref["old_value"], mask, 1.0, 1.0)
    result.compare("mc_advantage", advantages, ref["mc_advantage"], 1e-10)
    result.compare("mc_return", returns, ref["mc_return"], 1e-10)
    advantages, returns = ppo.gae(rewards, ref["old_value"], mask, 1.0, 0.9)
    white = ppo.whiten(advantages, mask)
    result.compare("advantage_whitened", white, ref["advantage_whitened"], 1e-10)
    new = taken["new"].clone().requires_grad_()
    ratio, n = (new - taken["old"]).exp(), mask.sum()
    result.compare("ratio", ratio * mask, ref["ratio"], 1e-10)
    each = ppo.clipped_loss(ratio, white, ref["clip"].item()) * mask
    result.compare("pg_each", each, ref["pg_each"], 1e-10)
    weight = ref["pareto_mask"].double() / ref["pareto_mask"].sum()  # of motions: 1 / n(P)
    for reduction, name in (("motion", "mean_t"), ("token", "token_mean")):
        shares = pareto.token_weights(weight, mask, reduction)
        result.compare(f"pareto_pg_{name}", (each * shares).sum() / shares.sum(), ref[f"pareto_pg_{name}"],
                       1e-10)
    result.compare("pareto_pg_sum_t", (each * shares).sum(), ref["pareto_pg_sum_t"], 1e-10)
    loss = each.sum() / n
    result.compare("pg_loss", loss, ref["pg_loss"], 1e-10)
    loss.backward()
    result.compare("grad_pg_logp", new.grad, ref["grad_pg_logp"], 1e-10)
    silent = (new.grad == 0) & mask & (white != 0)
    result.compare("clipped_active", silent, ref["clipped_active"] & mask, 0)
    values = ref["new_value"].clone().requires_grad_()
    loss = (ppo.value_loss(values, returns) * mask).sum() / n
    result.compare("vf_loss", loss, ref["vf_loss"], 1e-10)
    loss.backward()
    result.compare("grad_vf_value", values.grad, ref["grad_vf_value"], 1e-10)


def check_rewards(result, ref):
    """Eq. (1) and (2) of InstructMotion, (3), (4) and (11) of MotionRL; its InfoNCE is twice ours, which is a
    mean of two."""
    import pareto_motion as pareto
    import ppo_motion as ppo

    f_t, f_m = ref["contrastive/ft"], ref["contrastive/fm"].clone().requires_grad_()
    wrong, margin = ref["contrastive/mismatched"] > 0, ref["contrastive/margin"].item()
    each = torch.stack([ppo.margin_loss(f_t[k], f_m[k], wrong[k], margin) for k in range(len(f_t))])
    result.compare("contrastive/loss_each", each, ref["contrastive/loss_each"], 1e-10)
    loss = ppo.margin_loss(f_t, f_m, wrong, margin)
    result.compare("contrastive/loss_mean", loss, ref["contrastive/loss_mean"], 1e-10)
    loss.backward()
    result.compare("contrastive/grad_fm", f_m.grad, ref["contrastive/grad_fm"], 1e-10)
    cosine = 2 * retrieval.info_nce(ref["infonce/ft"], ref["infonce/fm"], ref["infonce/tau"].item())
    result.compare("infonce/loss_cosine", cosine, ref["infonce/loss_cosine"], 1e-10)
    distances = ppo.reward_terms(ref["eq2/ft"], ref["eq2/fm_pred"], ref["eq2/fm_gt"])
    weights = ref["eq2/lambda_t"].item(), ref["eq2/lambda_m"].item()
    everyone = torch.ones_like(ref["eq2/paired"])
    r, pseudo = ppo.motion_reward(*distances, ref["eq2/paired"], *weights)
    result.compare("eq2/reward_mixed", r, ref["eq2/reward_mixed"], 1e-10)
    result.compare("eq2/pseudo_score", pseudo, ref["eq2/pseudo_score"], 1e-10)
    result.compare("eq2/reward_all_paired", ppo.motion_reward(*distances, everyone, *weights)[0],
                   ref["eq2/reward_all_paired"], 1e-10)
    result.compare("eq2/reward_text_only", ppo.motion_reward(*distances, ~everyone, *weights)[0],
                   ref["eq2/reward_text_only"], 1e-10)
    f_t, f_m, f_gt = (ref[f"eq34/{name}"] for name in ("ft", "fm_pred", "fm_gt"))  # i b c
    for name, other in (("r_t", f_t), ("r_m", f_gt)):
        result.compare(f"eq34/{name}", pareto.distance_reward(other, f_m, ref["eq34/lambda"]),
                       ref[f"eq34/{name}"], 1e-10)
    mixed = pareto.mix(ref["eq11/f_t"], ref["eq11/f_tk"], ref["eq11/alpha"][:, None, None, None])
    result.compare("eq11/mixed", mixed, ref["eq11/mixed"], 1e-10)
