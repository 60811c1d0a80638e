"""Compare the benchmark's evaluator with the public official code (see tests/parity): its networks, its
words, and whole evaluations as MDM and MLD run them, from a data folder to the numbers of a table.
"""
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import freeze, masked, metrics
from common.datasets import MAX_LENGTH, Statistics
from common.published import evaluator, folder as data_folder
from tests import reference
from tests.parity.rows import error, shapes_error, state


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    if path.is_dir():
        return check_glove(path)
    with np.load(path) as z, torch.no_grad():
        return check_guo(z) if path.name.startswith("guo_eval_") else check_official(path, z)


# ---- 1. The networks -----------------------------------------------------------------------------------


def check_guo(z):
    rows = []
    for kind in ("t2m", "kit"):
        get = lambda key: torch.from_numpy(z[f"{kind}_{key}"])
        motions, lengths, order = get("motions"), get("m_lens"), get("align_idx")
        networks = {name: state(z, f"{kind}_sd/{name}/")
                    for name in ("movement_encoder", "motion_encoder", "text_encoder")}
        # mean 0 and std 1: the reference motions are normalised already
        plain = Statistics(torch.zeros(motions.shape[2]), torch.ones(motions.shape[2]), "scorer")
        judge = freeze(evaluator.OfficialEvaluator(networks, plain, max_length=motions.shape[1]))
        text = judge.embed_text(get("word_embs"), get("pos_onehot"), get("cap_lens"))
        movements = judge.movement_encoder(motions[..., :-4])
        motion = judge.embed_motion(motions, lengths)
        full = {"movement_encoder": evaluator.MovementEncoder(motions.shape[2] - 4),
                "motion_encoder": evaluator.MotionEncoderBiGRU(),
                "text_encoder": evaluator.TextEncoderBiGRU()}
        rows += [(f"{kind}_movements", error(movements, get("movements")), 1e-5),
                 (f"{kind}_text_embedding", error(text, get("text_embedding")), 1e-5),
                 (f"{kind}_motion_embedding", error(motion, get("motion_embedding")), 1e-5),
                 (f"{kind}_text_embedding_wrapper_order",
                  error(text[order], get("text_embedding_wrapper_order")), 1e-5),
                 (f"{kind}_motion_embedding_wrapper_order",
                  error(motion[order], get("motion_embedding_wrapper_order")), 1e-5),
                 (f"{kind}_full_size_keys", shapes_error(
                     z[f"{kind}_full_size_keys"], {n: m.state_dict() for n, m in full.items()}), 0.0)]
    a, b, margin = torch.from_numpy(z["loss_a"]), torch.from_numpy(z["loss_b"]), float(z["loss_margin"])
    positive = torch.zeros(len(a), dtype=torch.bool)
    matched = reference.margin_loss(a, b, positive, margin)
    shifted = reference.margin_loss(a, b.roll(-3, 0), ~positive, margin)
    return rows + [
        ("loss_pos", error(matched, z["loss_pos"], relative=True), 1e-5),
        ("loss_neg_shift3", error(shifted, z["loss_neg_shift3"], relative=True), 1e-5)]


# ---- 2. Words ------------------------------------------------------------------------------------------


def check_glove(path):
    """The folder of word vectors, against the same content without pickles."""
    glove = evaluator.read_glove(path)
    listed = [line.split() for line in (path / "words.txt").read_text().splitlines()]
    with np.load(path / "glove.npz") as z:
        return [("words.txt", differing(list(glove.rows.items()), [(word, int(row)) for word, row in listed]),
                 0.0),
                ("words", differing(list(glove.rows), z["words"]), 0.0),
                ("rows", differing(list(glove.rows.values()), z["rows"]), 0.0),
                ("vectors", error(glove.vectors, z["vectors"]), 1e-6)]


def differing(ours, theirs):
    """Number of entries of two lists that differ; infinite where one is longer."""
    theirs = np.atleast_1d(theirs).tolist() if isinstance(theirs, np.ndarray) else theirs
    if len(ours) != len(theirs):
        return float("inf")
    return float(sum(a != b for a, b in zip(ours, theirs)))


def check_words(z, glove):
    """Vectors and classes of single tokens, and the words of the folder."""
    rows, classes = zip(*map(glove.token, z["tokens"].tolist()))
    return [("glove_words", differing(list(glove.rows), z["glove_words"]), 0.0),
            ("glove_vectors", error(glove.vectors[list(glove.rows.values())], z["glove_vectors"]), 1e-6),
            ("token_vector", error(glove.vectors[list(rows)], z["token_vector"]), 1e-6),
            ("token_pos", error(F.one_hot(torch.tensor(classes), 15), z["token_pos"]), 0.0)]


# ---- 3. A data folder and an evaluator's folder ----------------------------------------------------------


def write_data(root, z):
    """The data folder of a reference file; its ids are all in the test split."""
    for key in (key.removeprefix("data/") for key in z.files if key.startswith("data/")):
        target, value = root / key, z[f"data/{key}"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if value.dtype.kind == "U":
            target.with_suffix(".txt").write_text(str(value))
        else:
            np.save(target.with_name(f"{target.name}.npy"), value.astype(np.float32))
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("")


def write_evaluator(root, z):
    """The evaluator's folder of a reference file, without its word vectors."""
    (root / "meta").mkdir(parents=True)
    torch.save({name: state(z, f"sd/{name}/") for name in (
        "movement_encoder", "motion_encoder", "text_encoder")} | {"epoch": 3, "iter": 7}, root / "finest.tar")
    for name in ("mean", "std"):
        np.save(root / "meta" / f"{name}.npy", z[f"evaluator_{name}"])


def any_numbers(path, skeleton):
    """What folder._motion_reason says, without its look at bodies: synthetic numbers are no one's motion."""
    motion = data_folder.load_array(path)
    reason = data_folder._length_reason(len(motion), skeleton)
    return None if reason else motion, reason or "", ""


def official_samples(root):
    """Clips of the test split in the official order: by length, sub-segments before their whole."""
    skeleton, mean, std = data_folder.read_statistics(root)
    with mock.patch.object(data_folder, "_motion_reason", any_numbers):
        clips, _, _ = data_folder.read_split(root, "test", skeleton)
    order = {}
    for clip in clips:
        order.setdefault(clip["name"].partition("@")[0], []).append(clip)
    clips = [clip for group in order.values() for clip in sorted(group, key=lambda c: "@" not in c["name"])]
    clips.sort(key=lambda clip: len(clip["features"]))
    return clips, torch.from_numpy(mean), torch.from_numpy(std)


def check_samples(z, samples):
    """Which clips the folder gives, in which order."""
    names = [clip["name"].partition("@") for clip in samples]
    frames = [len(clip["features"]) for clip in samples]
    spans = [tuple(map(int, part.partition(".")[0].split("-"))) if part else (0, count)
             for (_, _, part), count in zip(names, frames)]
    # the official name of a sub-segment is a random letter and the id
    shown = [("_" if part else "") + source for source, _, part in names]
    rows = {"count": [len(samples)], "source": [source for source, _, _ in names], "frames": frames,
            "from": [first for first, _ in spans], "to": [last for _, last in spans],
            "captions": [len(clip["captions"]) for clip in samples],
            "first_caption": [clip["captions"][0] for clip in samples]}
    result = [(f"sample_{name}", differing(ours, z[f"sample_{name}"]), 0.0) for name, ours in rows.items()]
    for key in (key for key in ("sample_names", "mld/names") if key in z.files):
        theirs = [name[1:] if "_" in name else name for name in z[key].tolist()]
        result.append((key, differing(shown, theirs), 0.0))
    return result


# ---- 4. An evaluation as MDM runs it ---------------------------------------------------------------------


class World:
    """What all passes share: the clips, the statistics of the generator, evaluator and word vectors."""

    def __init__(self, path, z):
        with tempfile.TemporaryDirectory() as root:
            root = Path(root)
            write_data(root / "data", z)
            write_evaluator(root / "evaluator", z)
            glove = path.parent / json.loads(bytes(z["meta_json"]))["glove"]
            shutil.copytree(glove, root / "evaluator" / "glove")
            self.samples, self.mean, self.std = official_samples(root / "data")
            self.judge, self.glove = evaluator.load_evaluator_folder(root / "evaluator")

    def crops(self, item, caption, start, length):
        """Arrays (n) of a pass -> raw motions (n 196 d), zeros after the end, and lists of tokens."""
        motion = torch.zeros(len(item), MAX_LENGTH, len(self.mean))
        for row, k, first, n in zip(motion, item, start, length):
            row[:n] = torch.from_numpy(self.samples[k]["features"][first:first + n])
        return motion, [self.samples[k]["tokens"][c] for k, c in zip(item, caption)]

    def from_generator(self, motion):
        """Motions in the generator's normalised space -> the evaluator's, padding included."""
        return (motion * self.std + self.mean - self.judge.mean) / self.judge.std


class Pass:
    """One pass over the loader: what was drawn (n = 64), in the order drawn, and its rows for the parity."""

    def __init__(self, world, z, prefix):
        get = lambda key: z[f"{prefix}_{key}"]
        self.item, self.length, coin, start = (get(key) for key in ("item", "length", "coin", "start"))
        frames = z["sample_frames"][self.item]
        self.motion, tokens = world.crops(self.item, get("caption"), start, self.length)
        self.words = world.glove.encode(tokens)
        free = frames - self.length - start
        self.rows = [(f"{prefix}_length", error((frames // 4 - coin) * 4, self.length), 0.0),
                     (f"{prefix}_start", float(((start < 0) | (free < 0)).sum()), 0.0),
                     (f"{prefix}_sent_len", error(self.words[2], get("sent_len")), 0.0)]

    def ordered(self, row_draw):
        """Rows that are no permutation of their batch of 32, or not sorted by length, the longest first."""
        batches = zip(row_draw.reshape(-1, 32), np.arange(len(row_draw)).reshape(-1, 32))
        return sum(sorted(rows.tolist()) != own.tolist() or (np.diff(self.length[rows]) > 0).any()
                   for rows, own in batches)


def table(text, motion, real, first, second):
    """The metrics of embeddings (n c) in the order of the rows, in pools of 32."""
    return {"mm_dist": metrics.mm_dist(text, motion), "fid": metrics.fid(motion, real),
            "r_precision": metrics.r_precision(text, motion)["top"],
            "diversity": metrics.diversity(motion, torch.from_numpy(first), torch.from_numpy(second))}


def check_replication(world, z, rep):
    """One replication -> the rows of its passes and metrics, and the metrics of this project."""
    judge, name, draws, found, rows = world.judge, f"rep{rep}", {}, {}, []
    for kind in ("gen", "gt", "fid"):
        draws[kind] = Pass(world, z, f"{name}/{kind}")
        rows += draws[kind].rows
    # b g k r: batch, repeat, place in the batch, term
    motion = np.einsum("bgkr,rt,rd->gbktd", z["gen_coef"][rep], z["gen_time"], z["gen_feature"])
    generated = world.from_generator(torch.from_numpy(rearrange(motion, "g b k t d -> g (b k) t d")).float())
    lengths = {kind: torch.from_numpy(one.length) for kind, one in draws.items()}
    # generated frames up to the 196th are left where they are, real ones are zero behind their end
    seen = {kind: judge.embed_motion(one.motion, lengths[kind]) for kind, one in draws.items()}
    seen["gen"] = judge.embed_normalised(generated[0], lengths["gen"])
    for kind, motion in seen.items():
        row_draw = z[f"{name}/{kind}_row_draw"]
        seen[kind] = motion[row_draw]
        rows += [(f"{name}/{kind}_row_draw", float(draws[kind].ordered(row_draw)), 0.0),
                 (f"{name}/{kind}_motion_embedding",
                  error(seen[kind], z[f"{name}/{kind}_motion_embedding"]), 1e-5)]
    for kind in ("gen", "gt"):
        get = lambda key: z[f"{name}/{key}"]
        text = judge.embed_text(*draws[kind].words)[get(f"{kind}_row_draw")]
        pairs = get(f"{kind}_div_first"), get(f"{kind}_div_second")
        found[kind] = table(text, seen[kind], seen["fid"], *pairs)
        rows.append((f"{name}/{kind}_text_embedding", error(text, get(f"{kind}_text_embedding")), 1e-5))
        rows += [(f"{name}/{key}", error(found[kind][metric], get(key)), 1e-9 if "precision" in key else 1e-5)
                 for metric in found[kind] for key in [
                     f"fid_{kind}" if metric == "fid" else f"{kind}_{metric}"]]
    many, found["gen"]["multimodality"] = check_multimodality(world, z, name, generated, lengths["gen"])
    return rows + many + (check_first_batch(world, z, draws["gt"], generated) if rep == 0 else []), found


def check_multimodality(world, z, name, generated, lengths):
    """All repeats (g) of the chosen batches -> rows, and the metric."""
    get = lambda key: torch.from_numpy(z[f"{name}/{key}"])
    chosen = torch.cat([torch.arange(32) + 32 * batch for batch in get("mm_batches")])
    many = torch.stack([world.judge.embed_normalised(one[chosen], lengths[chosen]) for one in generated], 1)
    value = metrics.multimodality(many, get("mm_first"), get("mm_second"))
    return [(f"{name}/mm_embedding", error(many, get("mm_embedding")), 1e-5),
            (f"{name}/multimodality", error(value, z[f"{name}/multimodality"]), 1e-5)], value


def check_first_batch(world, z, drawn, generated):
    """Single numbers of what the networks of the first batch are given."""
    judge, motion = world.judge, drawn.motion[:32].double()
    motion = masked((motion - judge.mean.double()) / judge.std.double(), torch.from_numpy(drawn.length[:32]))
    at, columns = z["check_rows"], z["check_features"]
    last = drawn.length[at] - 1
    after = np.minimum(last + 1, MAX_LENGTH - 1)  # the last row, where none is padding
    given = {"first": motion[at, 0], "last": motion[at, last], "after": motion[at, after]}
    made = {"first": generated[0, z["check_gen_rows"], 0], "195": generated[0, z["check_gen_rows"], 195]}
    rows = [(f"check_{key}", error(value[:, columns], z[f"check_{key}"]), 1e-5)
            for key, value in given.items()]
    rows += [(f"check_gen_{key}", error(value[:, columns], z[f"check_gen_{key}"]), 1e-5)
             for key, value in made.items()]
    return rows + [
        ("check_motion_sum", error(motion.sum((1, 2)), z["check_motion_sum"], relative=True), 1e-5),
        ("check_word_sum", error(drawn.words[0][:32].double().sum((1, 2)), z["check_word_sum"]), 1e-5),
        ("check_pos", error(drawn.words[1][:32].argmax(-1), z["check_pos"]), 0.0)]


def check_means(z, found):
    """The means over the replications, under the names of the official log."""
    names = {"Matching_Score": "mm_dist", "R_precision": "r_precision", "FID": "fid",
             "Diversity": "diversity", "MultiModality": "multimodality"}
    kinds = {"ground_truth": "gt", "vald": "gen"}
    for key in (key for key in z.files if key.startswith("mean/")):
        name, kind = next((name, kind) for name in names for kind in kinds if key == f"mean/{name}_{kind}")
        values = [torch.as_tensor(one[kinds[kind]][names[name]]) for one in found]
        yield key, error(torch.stack(values).mean(0), z[key]), 1e-9 if "precision" in key else 1e-5


def check_official(path, z):
    world = World(path, z)
    rows, found = [*check_samples(z, world.samples), *check_words(z, world.glove)], []
    for rep in range(json.loads(bytes(z["meta_json"]))["replications"]):
        more, metric = check_replication(world, z, rep)
        rows, found = rows + more, found + [metric]
    return [*rows, *check_means(z, found), *(check_mld(world, z) if "mld/names" in z.files else [])]


# ---- 5. The same evaluator as MLD uses it ----------------------------------------------------------------


def mld_pass(world, z, number, batch):
    """Normalised motions of a pass, padded to the longest of their batch -> (text, motion) (N c) each."""
    caption, coin, start, length = (z[f"mld/{key}"][number] for key in ("caption", "coin", "start", "length"))
    motion, tokens = world.crops(np.arange(len(length)), caption, start, length)
    lengths = torch.from_numpy(length)
    # padded with zeros in the generator's space
    motion = world.from_generator(masked((motion - world.mean) / world.std, lengths))
    seen = [world.judge.embed_normalised(part[:, :int(n.max())], n)
            for part, n in zip(motion.split(batch), lengths.split(batch))]
    return world.judge.embed_text(*world.glove.encode(tokens)), torch.cat(seen)


def check_mld(world, z):
    """All samples in their fixed order, twice; MLD's own metrics of the two."""
    get, order = lambda key: z[f"mld/{key}"], z["mld/row_item"]
    frames = z["sample_frames"]
    rows = [("mld/length", error((frames // 4 - get("coin")) * 4, get("length")), 0.0),
            ("mld/padded_to", error([part.max() for part in np.split(get("length")[0], (32, 64))],
                                    get("padded_to")), 0.0)]
    (text, motion), (_, other) = (mld_pass(world, z, number, 32) for number in (0, 1))
    alone = mld_pass(world, z, 0, 1)[1][:8]
    text, motion, other = text[order], motion[order], other[order]
    rows += [(f"mld/{key}", error(ours, get(key)), 1e-5) for key, ours in (
        ("text_embedding", text), ("motion_embedding", motion), ("other_embedding", other),
        ("alone_motion_embedding", alone))]
    text, motion, other = (part[get("shuffle")] for part in (text, motion, other))
    pools = slice(0, len(text) // 32 * 32)
    for start, seen, first, second in (("", other, get("div_first"), get("div_second")),
                                       ("gt_", motion, get("gt_div_first"), get("gt_div_second"))):
        ours = {"Matching_score": metrics.mm_dist(text[pools], seen[pools]),
                "Diversity": metrics.diversity(seen, torch.from_numpy(first), torch.from_numpy(second))}
        top = metrics.r_precision(text, seen)["top"]
        ours |= {f"R_precision_top_{k}": share for k, share in enumerate(top, 1)}
        rows += [(f"mld/metric/{start}{key}", error(value, get(f"metric/{start}{key}")),
                  1e-9 if "precision" in key else 1e-5) for key, value in ours.items()]
    return rows + [("mld/metric/FID", error(metrics.fid(other, motion), get("metric/FID")), 1e-5)]
