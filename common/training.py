"""Training: the one supervised loop and its cache, minibatches, checks of numbers, several processes.

Whatever a paper takes as given (tokenizer, VAE, base, scorers) is trained by `supervised` and kept by
`cached`. The reinforcement learning loops are the scripts'; here is what is plumbing in them.
"""
import ast
import inspect
import math
import textwrap

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import InputError, NonFiniteError, generator
from common.runs import fingerprint, load_checkpoint, make_folder, plain, save_checkpoint

# ---- 1. Supervised training --------------------------------------------------------------------

def initialise(model, g):
    """Draw the weights of all linear, convolution and embedding layers from the generator g; PyTorch's own
    initialisation draws from the global stream."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            bound = 1.0 / math.sqrt(module.weight[0].numel())  # numbers that an output is made of
            module.weight.data.uniform_(-bound, bound, generator=g)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(0.0, 1.0, generator=g)


def rise_and_cosine(optimizer, iterations):
    """The learning rate rises over the first twentieth of the iterations and falls as a cosine."""
    warmup = max(1, iterations // 20)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warmup) * 0.5 * (
        1 + math.cos(math.pi * max(0, i - warmup) / max(1, iterations - warmup))))


def supervised(label, parameters, loss, *, iterations, lr, weight_decay=1e-2, betas=(0.9, 0.999),
               fix="huge values in the data?", after=None):
    """Train `parameters` by AdamW, gradients clipped to norm 1 -> {name: mean over the last tenth}.

    loss(iteration) is a scalar tensor, or that and a dict of further numbers to show and to average; if it
    is not finite, NonFiniteError names `label` and says `fix`. after(iteration): called after each step.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    scheduler, log = rise_and_cosine(optimizer, iterations), []
    bar = tqdm(range(iterations), desc=label, mininterval=1.0)
    for iteration in bar:
        value, numbers = loss(iteration), {}
        if isinstance(value, tuple):
            value, numbers = value
        check_loss(value, f"{label}, iteration {iteration}", fix)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        log.append({"loss": value.item(), **numbers})
        recent = log[-50:]  # of a hundred and more: a single batch is noisy
        bar.set_postfix({name: f"{sum(row[name] for row in recent) / len(recent):.3f}" for name in log[-1]},
                        refresh=False)
        if after:
            after(iteration)
    last = log[-max(1, iterations // 10):]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0]} if last else {}


# ---- 2. The cache ------------------------------------------------------------------------------

def source_of(*parts):
    """What the code of functions, classes and modules does, as a list of texts for a cache's key. Comments
    and docstrings are left out: to explain a line better must not train anything again."""
    texts = []
    for part in parts:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring; no other bare constant does anything either
        texts.append(ast.unparse(tree))
    return texts


def cached(folder, key, build, name, use_cache=True):
    """The dict that `build()` returns, or its copy in `<folder>/<name>-<hash of key>.pt`; key: plain data. A
    damaged file is announced and rebuilt; use_cache=False always rebuilds."""
    path = make_folder(folder, "--cache-dir") / f"{name}-{fingerprint(key)[:16]}.pt"
    if use_cache and path.exists():
        try:
            return load_checkpoint(path, kind=f"cache {name}")
        except InputError as error:
            print(f"rebuilding {name}: {error}")
    data = plain(build())  # the same types whether built or loaded
    save_checkpoint(path, data, kind=f"cache {name}", keep_previous=False)
    return data


# ---- 3. Parts of an update ---------------------------------------------------------------------

def minibatches(samples, count, index, chunk, g, apart=()):
    """Split samples, numbers in a list, into `count` shuffled minibatches -> [(size, chunks)].
    index: the samples that this process holds, in the order of its rows. chunks: those of its rows that
    belong to the minibatch, in lists of at most `chunk` (0: one list). size counts the samples of all
    processes. apart: samples that share no chunk with others."""
    row, apart, plan = {sample: n for n, sample in enumerate(index)}, set(apart), []
    for part in torch.randperm(len(samples), generator=g).chunk(count):
        mine = [samples[k] for k in part.tolist() if samples[k] in row]
        chunks, step = [], chunk or max(len(mine), 1)
        for side in (False, True):
            rows = [row[sample] for sample in mine if (sample in apart) == side]
            chunks += [rows[a:a + step] for a in range(0, len(rows), step)]
        plan.append((len(part), chunks))
    return plan


def epochs(args, samples, index, iteration, apart=()):
    """A plan of minibatches, see there, for each of args.epochs passes over the samples."""
    return [minibatches(samples, args.minibatches, index, args.micro_batch,
                        generator(args.seed, iteration, "shuffle", epoch), apart)
            for epoch in range(args.epochs)]


def select_rows(batch, samples):
    """The part of a batch that belongs to `samples` (numbers in a list). batch: dict of tensors and lists, a
    row a sample; batch["numbers"] says whose."""
    wanted = set(samples)
    rows = [row for row, number in enumerate(batch["numbers"]) if number in wanted]
    return {name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows]
            for name, value in batch.items()}


def rise_and_fall(iteration, iterations, warmup):
    """Factor of a learning rate: it rises over `warmup` iterations, and falls to zero over all."""
    # Not in the papers: Adam's first steps have full size in every weight, whether the gradient is
    # signal or noise, so the rate starts small; it ends small so that the policy settles.
    return min(1.0, (iteration + 1) / max(warmup, 1)) * (1 - iteration / iterations)


def rising(optimizer, warmup):
    """The scheduler of a learning rate that rises over so many updates, and stays."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: min(1.0, (count + 1) / max(1, warmup)))


class Sums:
    """Numbers of an iteration, added up chunk by chunk: `log.add(loss=..., kl=...)`, then `log.mean(n)`.
    names: of those that are zero if nothing is ever added."""

    def __init__(self, *names):
        self.values = dict.fromkeys(names, 0.0)

    def add(self, **values):
        """Add to the sums; tensors of one number become floats."""
        for name, value in values.items():
            value = value.item() if torch.is_tensor(value) else value
            self.values[name] = self.values.get(name, 0.0) + value

    def mean(self, count):
        """{name: sum / count}"""
        return {name: value / count for name, value in self.values.items()}


def ratio_stats(ratios):
    """What is logged of the ratios of an update, a list of tensors, one a chunk: how far the first ones are
    from 1, which must be 0, and the range of all."""
    first, every = (torch.cat(r) if r else torch.ones(1) for r in (ratios[:1], ratios))
    return {"first_ratio_error": (first - 1).abs().max().item(), "ratio_min": every.min().item(),
            "ratio_max": every.max().item()}


def token_stats(tokens, mask, lengths, end, kl, entropy):
    """What is logged of a rollout of tokens, over all processes: kl_ref a motion, entropy a token, length in
    frames, shares without an end and of different sequences. All (b n), lengths (b)."""
    made = all_gather_rows(tokens)
    return {"kl_ref": all_gather_rows((kl * mask).sum(1)).mean(),
            "entropy": all_gather_rows(entropy[mask]).mean(),
            "length": all_gather_rows(lengths).float().mean(),
            "truncated": (made[:, -1] < end).float().mean(),
            "distinct": len(torch.unique(made, dim=0)) / len(made)}


PPO_FIELDS = ("kl_ref", "entropy", "length", "truncated", "distinct", "explained_variance", "pg_loss",
              "vf_loss", "approx_kl", "clipfrac", "grad_norm", "vf_grad_norm", "first_ratio_error",
              "ratio_min", "ratio_max")  # what PPO on tokens logs


def explained_variance(values, returns, mask):
    """Share of the returns' variance that a critic foresees, over the valid tokens of all processes: 1 at
    best, 0 for a constant. All (b n)."""
    values, returns = (all_gather_rows(part[mask]) for part in (values, returns))
    return 1 - (returns - values).var() / returns.var().clamp(min=1e-12)


def check_loss(loss, where, fix="lower --lr"):
    """NonFiniteError if a loss is not finite; where: "iteration 3"."""
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{where}: loss {loss.item()}; {fix}")


def check_rewards(rewards, captions, where):
    """NonFiniteError that names the first caption whose reward (b) is not finite."""
    for reward, caption in zip(rewards.tolist(), captions):
        if not math.isfinite(reward):
            raise NonFiniteError(f"{where} {reward} for {caption!r}")


def clip_gradients(parameters, max_norm, where):
    """Scale the gradients down to max_norm -> their norm before; NonFiniteError at `where` if it is not."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not math.isfinite(norm):
        raise NonFiniteError(f"{where}: gradient norm {norm}; lower --lr")
    return norm


def in_bfloat16(forward):
    """A function of tensors that computes in bfloat16 where torch holds that safe; its answer is float32."""
    def low_precision(x, *rest):
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x, *rest).float()
    return low_precision


# ---- 4. Several processes (torchrun) -----------------------------------------------------------

def all_gather_rows(rows):
    """Concatenate `rows` (n ...) of all processes along dim 0 in rank order; n may differ between them."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros((max(map(int, counts)), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def total(parts):
    """The sum of all numbers in some tensors, over all processes, as a float."""
    return reduce_log({"sum": float(sum(part.sum().item() for part in parts))})["sum"]


def reduce_log(values):
    """{name: float} of this process -> of all processes: the sum, or an extreme where `kinds` says so. The
    norm of a gradient that was summed over processes is the same in all."""
    kinds = dict(ratio_min=min, ratio_max=max, first_ratio_error=max, grad_norm=max, vf_grad_norm=max)
    rows = all_gather_rows(torch.tensor([list(values.values())], dtype=torch.float64)).T.tolist()
    return {name: kinds.get(name, sum)(row) for name, row in zip(values, rows)}


def all_reduce_grads(parameters):
    """Sum the gradients of all processes in place; each loss must already be divided by the global count."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # every process has to take part in every reduction
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
