"""Picture stories: the scenes of one haystack of images, and what can be asked once some of them were seen.

Some objects are anchors: each is in the pictures of its group alone, and is what a question names them by. All other
objects are drawn for every picture anew, so that whether a target is elsewhere in the haystack says nothing about
whether it is beside the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laid_eval.window.probes import ScenesProbe
from laid_eval.window.questions import Question
from laid_eval.window.scenes import Scene, with_article

YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Group:
    """The pictures of one anchor."""

    anchor: str
    images: tuple[int, ...]
    """Ascending."""
    target: str | None = None
    """What is asked for where several pictures are asked about at once."""


@dataclass(frozen=True)
class PictureStory:
    """The scenes of one haystack, in order, and what is asked about them."""

    probe: ScenesProbe
    scenes: tuple[Scene, ...]
    groups: tuple[Group, ...]
    fillers: tuple[str, ...]
    """Objects that were drawn from for what lies beside anchors."""

    def questions(self, seen: int, rng: np.random.Generator) -> list[Question]:
        """Everything that can be asked when the first `seen` pictures have been shown."""
        out = []
        for k, group in enumerate(self.groups):
            if group.images[-1] >= seen:
                continue
            if group.target is not None:
                out.append(self._of_several(k, group))
            else:
                out += [self._of_one(k, j, group, seen, rng) for j in range(self.probe.per_image - 1)]
        return out

    def _of_one(self, k: int, j: int, group: Group, seen: int, rng: np.random.Generator) -> Question:
        """About one object of the anchor's picture, or one that is not there."""
        probe, (image,) = self.probe, group.images
        beside = [name for name in self.scenes[image].objects if name != group.anchor]
        name = f"{image}.{j}"
        if probe.form == "which":
            return self._which(name, group, beside[j], seen, rng)
        there = bool(rng.integers(2))
        anchors = {g.anchor for g in self.groups}
        absent = [name for name in self.fillers if name not in beside and name not in anchors]
        target = beside[j] if there else str(rng.choice(absent))
        return self._yes_no(name, group, target, there)

    def _which(self, name: str, group: Group, target: str, seen: int, rng: np.random.Generator) -> Question:
        """Rivals are objects of other pictures seen so far; where those are too few, others.

        They are drawn as often as they were seen, as the target is: counting objects tells little. No anchor is one.
        """
        probe, (image,) = self.probe, group.images
        out = {*self.scenes[image].objects, *(g.anchor for g in self.groups)}
        seen_so_far = [name for scene in self.scenes[:seen] for name in scene.objects if name not in out]
        others = [name for name in probe.objects if name not in out]
        drawn = [*rng.permutation(seen_so_far), *rng.permutation(others), *rng.permutation(sorted(out))]
        rivals = dict.fromkeys(str(name) for name in drawn if name not in self.scenes[image].objects)
        wrong = list(rivals)[: probe.choices - 1]
        at = int(rng.integers(probe.choices))
        choices = [*wrong[:at], target, *wrong[at:]]
        named = [with_article(choice) for choice in choices]
        prompt, lead = (text.format(anchor=with_article(group.anchor)) for text in (probe.question, probe.lead))
        prompt = f"{probe.instruction} {prompt}".strip()
        return Question(name, prompt, lead, tuple(named), at, image)

    def _of_several(self, k: int, group: Group) -> Question:
        assert group.target is not None
        holds = [group.target in self.scenes[image].objects for image in group.images]
        there = all(holds) if self.probe.form == "all" else any(holds)
        return self._yes_no(f"group{k}", group, group.target, there)

    def _yes_no(self, name: str, group: Group, target: str, there: bool) -> Question:
        anchor = with_article(group.anchor)
        # the published wording names the anchor of several pictures without an article
        prompt = self.probe.question.format(
            anchor=anchor if self.probe.needles == 1 else group.anchor, target=with_article(target)
        )
        prompt = f"{self.probe.instruction} {prompt}".strip()
        return Question(name, prompt, self.probe.lead, YES_NO, 0 if there else 1, group.images[-1])


def draw_pictures(probe: ScenesProbe, cuts: Sequence[int], rng: np.random.Generator) -> PictureStory:
    """The scenes of one haystack.

    Args:
        probe: What is asked.
        cuts: Numbers of pictures at which questions will be asked, ascending; the last is the haystack's length.
        rng: Decides everything.
    """
    count = cuts[-1]
    names = [str(n) for n in rng.permutation(probe.objects)]
    anchors, fillers = names[: probe.anchors], names[probe.anchors :]
    groups = _place(anchors, probe.needles, cuts, rng)
    objects: list[list[str]] = [[] for _ in range(count)]
    out = []
    for group in groups:
        target = None
        for image in group.images:
            objects[image].append(group.anchor)
        if probe.needles > 1:
            target = str(rng.choice(fillers))
            for image in _holders(probe.form, group.images, rng):
                objects[image].append(target)
        out.append(Group(group.anchor, group.images, target))
    avoid = {image: group.target for group in out for image in group.images}
    for image, there in enumerate(objects):
        left = [name for name in rng.permutation(fillers) if name not in there and name != avoid.get(image)]
        there += [str(name) for name in left[: probe.per_image - len(there)]]
    seeds = rng.integers(2**31, size=count)
    scenes = tuple(
        Scene(tuple(str(n) for n in rng.permutation(there)), int(seed))
        for there, seed in zip(objects, seeds, strict=True)
    )
    return PictureStory(probe, scenes, tuple(out), tuple(fillers))


def _holders(form: str, images: Sequence[int], rng: np.random.Generator) -> list[int]:
    """In which of an anchor's pictures the target is: yes and no are equally likely."""
    yes = bool(rng.integers(2))
    some = [int(i) for i in rng.permutation(images)[: int(rng.integers(1, len(images)))]]  # one at least, not all
    if form == "all":
        return list(images) if yes else some
    return (some if rng.integers(2) else list(images)) if yes else []


def _place(anchors: Sequence[str], needles: int, cuts: Sequence[int], rng: np.random.Generator) -> list[Group]:
    """Pictures for every anchor, one anchor a picture.

    The first anchor lies before the first cut, the others with a density that is flat up to the second cut and falls
    as one over the root of the position beyond, so that short and long haystacks have anchors to ask about, at all
    depths. Those that find no room are left out.
    """
    free = list(range(cuts[-1]))
    groups = []
    for k, anchor in enumerate(anchors):
        within = cuts[0] if k == 0 else cuts[-1]
        open_ = [image for image in free if image < within]
        if len(open_) < needles:
            continue
        flat = cuts[min(1, len(cuts) - 1)]
        density = np.array([1.0 if image < flat else (flat / (image + 1)) ** 0.5 for image in open_])
        images = rng.choice(open_, size=needles, replace=False, p=density / density.sum())
        free = [image for image in free if image not in images]
        groups.append(Group(anchor, tuple(sorted(int(i) for i in images))))
    return groups
