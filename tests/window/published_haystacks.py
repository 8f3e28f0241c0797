"""A small Visual Haystacks in the published format, with scenes of ours for COCO's pictures."""

import json
from itertools import count

import numpy as np

from laid_eval.window.picture_reading import draw_haystack
from laid_eval.window.probes import load_probe
from laid_eval.window.scenes import draw


def write_dataset(folder, lengths=(1, 2, 5), cases=8, size=64, probe="visual-haystack", seed=3):
    """One file a length, half of the answers yes, JPEG and PNG; the paths of the files and the folder of the pictures."""
    declared = load_probe(probe)
    images = folder / "coco"
    files, number = [], 0
    for length in lengths:
        entries = []
        for k in range(cases):
            wanted, found = ("yes", "no")[k % 2], []
            for turn in count():  # until there is a question with that answer
                story = draw_haystack(declared, seed, 100_000 * length + 1000 * k + turn, (length,))
                asked = story.questions(length, np.random.default_rng([seed, k, turn]))
                found = [q for q in asked if q.choices[q.answer].lower() == wanted]
                if found:
                    break
            question = found[0]
            group = next(g for g in story.groups if f"{g.anchor}," in question.prompt)
            names = []
            for scene in story.scenes:
                number += 1
                part, kind = (("train2017", "jpg"), ("val2017", "png"))[number % 3 == 0]
                names.append(f"{part}/{number:012d}.{kind}")
                path = images / names[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(scene, size).resize((size, size - number % 2 * size // 4)).save(path)
            entries.append(
                {
                    "id": 100 + k,
                    "conversations": [
                        {"from": "human", "value": question.prompt.split(": ", 1)[1]},
                        {"from": "gpt", "value": question.choices[question.answer].lower()},
                    ],
                    "pos_image": [names[i] for i in group.images],
                    "neg_image": [name for i, name in enumerate(names) if i not in group.images],
                }
            )
        files.append(folder / f"visual_haystack_{'oracle' if length == 1 else length}.json")
        files[-1].write_text(json.dumps(entries))
    return files, images
