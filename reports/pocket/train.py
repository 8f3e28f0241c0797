"""Trains the pocket family on offline Visual Haystacks: `make pocket`. CPU only; every stage is kept and resumed.

1. One vision tower for both learns to name the objects of single pictures; each model's own merger learns to say it in
   the model's words.
2. The teacher's language model learns to answer about haystacks of 1 to 160 pictures, short ones first.
3. The student's, half as wide and a layer less deep, learns from 1 to 4 pictures.

Both learn at positions stretched over the range that 160 pictures take, so that none is new later.

In both, the first layer has losses of its own: a picture's tokens name all that the picture shows, and the answer's
place names what was asked about. Without them, finding the picture by its content did not begin within the hour.

No window is planted: what differs between the two is size and the number of pictures in training. Training pictures and
questions come from seeds that no evaluation uses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from family import MERGE, PATCH, SIDE, STUDENT, TEACHER, make_model, make_processor, make_tokenizer

from laid_eval.window.pictures import Group, PictureStory
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import Scene, draw

SEED = 1_000_000_007  # the evaluation's seeds are small numbers
PROBES = [load_probe("visual-which"), load_probe("visual-haystack")]
OBJECTS = PROBES[0].objects
SIDE_TOKENS = SIDE // PATCH // MERGE
PER_IMAGE = SIDE_TOKENS**2
ADVANCE = SIDE_TOKENS + 2  # RoPE positions that a picture takes: its longer side and two markers
REACH = 160 * ADVANCE
FIRST = 3  # pictures; bare which-questions until they are answered
STAGES = {"teacher": (TEACHER, 160, True, 56.0), "student": (STUDENT, 4, True, 9.0)}
"""Size, most pictures in training, whether positions are stretched, minutes of one core."""


class Pool:
    """Scenes drawn once, as patches, and what they show."""

    def __init__(self, size: int, seed: int, folder: Path, processor) -> None:
        rng = np.random.default_rng([SEED, seed])
        self.scenes = [
            Scene(tuple(str(n) for n in rng.choice(OBJECTS, 3, replace=False)), int(rng.integers(2**31)))
            for _ in range(size)
        ]
        self.holds = torch.tensor([[name in s.objects for name in OBJECTS] for s in self.scenes])
        path = folder / f"pool-{seed}.pt"
        if not path.exists():
            parts = []
            for at in range(0, size, 50):
                pictures = [draw(s, PROBES[0].size) for s in self.scenes[at : at + 50]]
                pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
                parts.append(pixels.view(len(pictures), -1, 3, 2, PATCH, PATCH)[:, :, :, 0].half())
            torch.save(torch.cat(parts), path)
        self.patches = torch.load(path)

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        """As the processor gives them: both frames of a still picture are the same."""
        some = self.patches[index].float()
        return some[:, :, :, None].expand(-1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * PATCH * PATCH)

    def story(self, count: int, rng: np.random.Generator) -> tuple[list[int], tuple[Group, ...]]:
        """Pictures of one haystack and its anchors: objects that are in one of them only."""
        anchors = rng.choice(len(OBJECTS), PROBES[0].anchors, replace=False)
        number = self.holds[:, anchors].sum(dim=1).numpy()
        index = rng.choice(np.flatnonzero(number == 0), count, replace=False)
        for anchor, image in zip(anchors, rng.permutation(count), strict=False):
            own = np.flatnonzero((number == 1) & self.holds[:, anchor].numpy())
            index[image] = rng.choice(own)
        holds = self.holds[index]
        alone = np.flatnonzero(holds.sum(dim=0).numpy() == 1)
        groups = [Group(OBJECTS[k], (int(holds[:, k].nonzero()),)) for k in rng.permutation(alone)]
        return [int(i) for i in index], tuple(groups)


def features(model, pool: Pool) -> torch.Tensor:
    """(scenes, tokens, E) what the vision tower says of every scene, before the merger's last layer."""
    out = []
    with torch.no_grad():
        for at in range(0, len(pool.scenes), 100):
            out.append(see(model, pool, torch.arange(at, min(at + 100, len(pool.scenes)))).half())
    return torch.cat(out)


def see(model, pool: Pool, index: torch.Tensor) -> torch.Tensor:
    kept = {}
    hook = model.model.visual.merger.mlp[1].register_forward_hook(lambda _m, _i, out: kept.update(out=out))
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * len(index))
    model.model.visual(pool.pixels(index), grid_thw=grid)
    hook.remove()
    return kept["out"].view(len(index), PER_IMAGE, -1)


def train_vision(model, pool: Pool, held: Pool, folder: Path, steps: int, log) -> None:
    """Every merged token says which objects it sees; the loudest one counts."""
    path = folder / "vision.pt"
    if path.exists():
        model.model.visual.load_state_dict(torch.load(path), strict=True)
        return
    torch.manual_seed(SEED % 2**31)
    head = nn.Linear(model.model.visual.merger.mlp[0].out_features, len(OBJECTS))
    parameters = [*model.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng([SEED, 2])
    started = time.time()
    for step in range(steps):
        index = torch.as_tensor(rng.choice(len(pool.scenes), 32, replace=False))
        logits = head(see(model, pool, index)).logsumexp(dim=1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, pool.holds[index].float()) * len(OBJECTS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            with torch.no_grad():
                some = torch.arange(200)
                top = head(see(model, held, some)).logsumexp(dim=1).topk(3).indices
                right = held.holds[some].gather(1, top).float().mean()
            log(stage="vision", step=step + 1, loss=float(loss), held=float(right), seconds=time.time() - started)
    torch.save(model.model.visual.state_dict(), path)


class Batcher:
    """Haystacks with all their questions as branches: each sees the pictures and itself."""

    def __init__(self, tokenizer, pool: Pool, seen: torch.Tensor) -> None:
        self.tokenizer, self.pool, self.seen = tokenizer, pool, seen
        self.words: dict[str, list[int]] = {}
        self.opening = self.ids("<|im_start|>user\n")
        self.markers = self.ids("<|vision_start|>"), self.ids("<|image_pad|>"), self.ids("<|vision_end|>")

    def ids(self, text: str) -> list[int]:
        if text not in self.words:
            self.words[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.words[text]

    def __call__(
        self, count: int, size: int, stretch: bool, harder: bool, rng: np.random.Generator, asked: int = 8
    ) -> dict:
        """`size` haystacks of `count` pictures, `asked` questions each; `harder`: yes or no too."""
        start, pad, end = self.markers
        prefix = [*self.opening, *([*start, *(pad * PER_IMAGE), *end] * count)]
        rows = []
        for _ in range(size):
            index, groups = self.pool.story(count, rng)
            scenes = tuple(self.pool.scenes[i] for i in index)
            some = groups[:asked]
            which, yes_no = (PictureStory(p, scenes, some, OBJECTS).questions(count, rng) for p in PROBES)
            questions = [*which, *which, *yes_no] if harder else which
            branches = []
            for k in rng.choice(len(questions), asked, replace=len(questions) < asked):
                q = questions[int(k)]
                asking = f"{q.prompt}<|im_end|>\n<|im_start|>assistant\n" if harder else ""
                stem = self.tokenizer(f"{asking}{q.lead}", add_special_tokens=False).input_ids
                answer = self.ids(f" {q.choices[q.answer]}" if q.lead else q.choices[q.answer])
                there = scenes[q.needle].objects if len(q.choices) > 2 else ()
                anchor = next(g.anchor for g in some if q.item.startswith(f"{g.images[0]}.") and g.anchor in q.prompt)
                beside_it = [self.ids(f" {name}")[0] for name in there if name != anchor]
                branches.append((stem, answer, self.ids(f" {anchor}")[0], beside_it))
            rows.append((index, branches))
        longest = max(len(s) + len(a) for _, branches in rows for s, a, *_ in branches)
        total = len(prefix) + asked * longest
        ids = torch.zeros(size, total, dtype=torch.long)
        labels = torch.full((size, total), -100)
        anchors = torch.zeros(size, total, dtype=torch.long)
        beside = torch.full((size, total, 2), -1)  # any object beside the anchor is right
        positions = torch.zeros(3, size, total, dtype=torch.long)
        real = torch.zeros(size, total, dtype=torch.bool)
        ids[:, : len(prefix)] = torch.tensor(prefix)
        real[:, : len(prefix)] = True
        for b, (_, branches) in enumerate(rows):
            after = self._positions(positions[:, b], count, stretch, rng)
            for k, (stem, answer, anchor, names) in enumerate(branches):
                at = len(prefix) + k * longest
                text = [*stem, *answer]
                ids[b, at : at + len(text)] = torch.tensor(text)
                real[b, at : at + len(text)] = True
                positions[:, b, at : at + longest] = after + torch.arange(longest)
                labels[b, at + len(stem) - 1 : at + len(text) - 1] = torch.tensor(answer)
                anchors[b, at + len(stem) - 1 : at + len(text) - 1] = anchor
                if names:
                    beside[b, at + len(text) - 2] = torch.tensor(names)
        own = torch.arange(total)
        branch = (own - len(prefix)).div(longest, rounding_mode="floor")
        visible = (own[:, None] >= own) & ((own < len(prefix)) | (branch[:, None] == branch))
        mask = visible[None] & real[:, None, :] | torch.eye(total, dtype=torch.bool)
        pictures = self.seen[torch.tensor([index for index, _ in rows])].float()
        shown = torch.tensor(
            [[[self.ids(f" {name}")[0] for name in self.pool.scenes[i].objects] for i in index] for index, _ in rows]
        )
        return {
            "ids": ids, "end": ids == end[0], "shown": shown, "anchors": anchors, "labels": labels,
            "positions": positions, "mask": mask[:, None], "pictures": pictures, "image": ids == pad[0],
            "beside": beside,
        }  # fmt: skip

    def _positions(self, out: torch.Tensor, count: int, stretch: bool, rng: np.random.Generator) -> int:
        """RoPE positions of the prefix as Qwen2.5-VL gives them; stretched: with random gaps up to REACH."""
        gaps = np.zeros(count + 1, dtype=int)  # before every picture, and before the questions
        if stretch:
            spare = max(REACH - count * ADVANCE, 0) * rng.uniform()
            gaps = np.diff(np.sort(rng.uniform(0, spare, count + 1)).astype(int), prepend=0)
        at = len(self.opening)
        out[:, :at] = torch.arange(at)
        position = at
        row, column = np.divmod(np.arange(PER_IMAGE), SIDE_TOKENS)
        for gap in gaps[:-1]:
            position += int(gap)
            out[:, at] = position
            inner = np.stack([np.zeros_like(row), row, column]) + position + 1
            out[:, at + 1 : at + 1 + PER_IMAGE] = torch.as_tensor(inner)
            position += ADVANCE - 1
            out[:, at + 1 + PER_IMAGE] = position
            position += 1
            at += PER_IMAGE + 2
        return position + int(gaps[-1])


def losses(model, batch: dict) -> tuple[torch.Tensor, float, float]:
    """Cross-entropy of answers and captions; share of named objects that are there; share of yes and no right."""
    text = model.model.language_model
    embedded = text.embed_tokens(batch["ids"])
    seen = model.model.visual.merger.mlp[2](batch["pictures"])
    embedded = embedded.masked_scatter(batch["image"][..., None], seen.to(embedded.dtype))
    mask = {"full_attention": batch["mask"]}
    out = text(inputs_embeds=embedded, position_ids=batch["positions"], attention_mask=mask, output_hidden_states=True)
    hidden, first = out.last_hidden_state, text.norm(out.hidden_states[1])
    kept = batch["labels"] != -100
    logits, wanted = model.lm_head(hidden[kept]), batch["labels"][kept]
    said, beside = logits.argmax(dim=-1), batch["beside"][kept]
    which = beside[:, 0] >= 0
    named = (said[which, None] == beside[which]).any(dim=1).float().mean()
    yes_no = (kept & ~kept.roll(-1, dims=1) & ~kept.roll(1, dims=1))[kept]  # answers of one token
    # after the first layer, a picture's tokens name all it shows, and the answer's place what was asked about
    shown = batch["shown"].flatten(0, 1).repeat_interleave(PER_IMAGE + 1, dim=0)
    captions = model.lm_head(first[batch["image"] | batch["end"]]).log_softmax(dim=-1).gather(1, shown).mean()
    asked = nn.functional.cross_entropy(model.lm_head(first[kept]), batch["anchors"][kept])
    loss = nn.functional.cross_entropy(logits, wanted) - 0.5 * captions + 0.25 * asked
    return loss, float(named), float((said == wanted)[yes_no].float().mean())


def align(model, pool: Pool, seen: torch.Tensor, tokenizer, log) -> None:
    """The merger's last layer learns the words: a picture's tokens look like the names of what they show."""
    words = torch.tensor([tokenizer(f" {name}", add_special_tokens=False).input_ids for name in OBJECTS])
    assert words.shape[1] == 1, "every object is one word"
    last, table = model.model.visual.merger.mlp[2], model.model.language_model.embed_tokens
    scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW([*last.parameters(), table.weight, scale], lr=2e-3)
    rng = np.random.default_rng([SEED, 4])
    for _ in range(600):
        index = torch.as_tensor(rng.choice(len(pool.scenes), 64, replace=False))
        names = nn.functional.normalize(table(words[:, 0]), dim=-1)
        said = nn.functional.normalize(last(seen[index].float()), dim=-1)
        logits = (scale.exp() * (said @ names.T)).logsumexp(dim=1)
        logits = logits - math.log(PER_IMAGE) - scale.exp() * 0.5
        loss = nn.functional.binary_cross_entropy_with_logits(logits, pool.holds[index].float()) * len(OBJECTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = pool.holds[index].gather(1, logits.topk(3).indices).float().mean()
    log(stage="align", loss=float(loss), right=float(right))
    with torch.no_grad():
        table.weight /= table.weight.std() / 0.5
        grown = 0.5 / last(seen[:100].float()).std()
        last.weight *= grown
        last.bias *= grown


def train_language(name: str, model, batcher: Batcher, folder: Path, log, shorter: float = 1.0) -> None:
    """Short haystacks until they are solved, then longer ones; all of them, at a falling rate, towards the end.

    `minutes` are of one core's own time, so that other work on the machine takes nothing from the training.
    """
    size, most, stretch, minutes = STAGES[name]
    minutes *= shorter
    rate = 0.4 / size.hidden  # a third of it, and the second layer never finds the pictures
    path, kept = folder / f"{name}.pt", folder / f"{name}-going.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return
    model.model.visual.requires_grad_(False)
    model.model.visual.merger.mlp[2].requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    longest, step, spent = FIRST, 0, 0.0
    if not kept.exists():
        align(model, batcher.pool, batcher.seen, batcher.tokenizer, log)
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        longest, step, spent = state["longest"], state["step"], state["spent"]
    recent: deque[float] = deque(maxlen=40)
    while spent < 60 * minutes:
        started = time.process_time()
        left = 1 - spent / (60 * minutes)
        if left < 0.2:
            longest = most  # whatever was solved by then: no length of the range stays unseen
        rng = np.random.default_rng([SEED, 3, step])
        count = longest if step % 2 else round(math.exp(rng.uniform(0, math.log(longest))))
        harder = longest > FIRST
        batch = batcher(count, max(2, min(12, 320 // count)), stretch, harder, rng, asked=8 if harder else 16)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200) * min(1.0, left / 0.6 + 0.02)
        loss, which, yes_no = losses(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if count == longest:
            recent.append(which)
        if longest < most and len(recent) == recent.maxlen and np.mean(recent) > 0.5:
            longest = min(most, math.ceil(longest * 1.6))
            recent.clear()
        step += 1
        spent += time.process_time() - started
        if step % 50 == 0:
            log(stage=name, step=step, longest=longest, count=count, loss=float(loss), which=which, yes_no=yes_no,
                recent=float(np.mean(recent)) if recent else 0.0, minutes=round(spent / 60, 2))  # fmt: skip
        if step % 200 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "longest": longest,
                     "step": step, "spent": spent}  # fmt: skip
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    torch.save(model.state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--shorter", type=float, default=1.0, help="share of the training time, to try things")
    parser.add_argument("--only", choices=[*STAGES, "vision"], help="one stage; the others as they are kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def log(**values) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        print(line, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    tokenizer = make_tokenizer(PROBES)
    processor = make_processor(tokenizer)
    pool, held = Pool(8000, 1, args.out, processor), Pool(800, 2, args.out, processor)
    torch.manual_seed(SEED % 2**31)
    teacher = make_model(TEACHER, tokenizer)
    train_vision(teacher, pool, held, args.out, 3500, log)
    seen = features(teacher, pool)
    for name, (size, *_) in STAGES.items():
        if args.only not in (None, name):
            continue
        torch.manual_seed(SEED % 2**31 + 1)
        model = make_model(size, tokenizer)
        tower = {k: v for k, v in teacher.model.visual.state_dict().items() if not k.startswith("merger.mlp.2")}
        model.model.visual.load_state_dict(tower, strict=False)
        train_language(name, model, Batcher(tokenizer, pool, seen), args.out, log, args.shorter)
        torch.nn.Module.to(model, torch.bfloat16).save_pretrained(args.out / f"pocket-{name}")
        processor.save_pretrained(args.out / f"pocket-{name}")


if __name__ == "__main__":
    main()
