"""Scenes: the same seed is the same picture, and every object of every probe can be drawn and told apart."""

import numpy as np
import pytest

from laid_eval.errors import UserError
from laid_eval.window.probes import ScenesProbe, load_probe, probe_names
from laid_eval.window.scenes import Scene, draw, scenes_source

VISUAL = [name for name in probe_names() if isinstance(load_probe(name), ScenesProbe)]


def pixels(scene, size=96):
    return np.asarray(draw(scene, size))


def test_a_scene_is_its_objects_and_its_seed():
    scene = Scene(("tiger", "bus", "pear"), 3)
    assert (pixels(scene) == pixels(scene)).all()
    assert (pixels(scene) != pixels(Scene(scene.objects, 4))).any()
    assert (pixels(scene) != pixels(Scene(("tiger", "bus", "rocket"), 3))).any()
    assert draw(scene, 224).size == (224, 224)


def test_sizes_places_and_backgrounds_vary():
    shots = [pixels(Scene(("tiger",), seed)) for seed in range(24)]
    blank = [pixels(Scene((), seed)) for seed in range(24)]
    where = [np.argwhere((a != b).any(axis=-1)) for a, b in zip(shots, blank, strict=True)]
    sizes = [np.ptp(w, axis=0).max() / 96 for w in where]
    assert min(sizes) < 0.33 < 0.37 < max(sizes) < 0.45
    centres = np.array([w.mean(axis=0) / 96 for w in where])
    assert (np.ptp(centres, axis=0) > 0.4).all()
    assert np.ptp([b.mean(axis=(0, 1)) for b in blank], axis=0).min() > 30


def test_objects_lie_beside_each_other():
    """What is drawn last hides next to nothing of what was drawn before."""
    hidden = []
    for seed in range(40):
        alone = [
            pixels(Scene(objects, seed)) for objects in ((), ("tiger",), ("tiger", "bus"), ("tiger", "bus", "pear"))
        ]
        drawn = [(a != b).any(axis=-1) for a, b in zip(alone[1:], alone, strict=False)]
        hidden.append((drawn[0] & drawn[2]).sum() / drawn[0].sum())
    assert np.mean(hidden) < 0.05


@pytest.mark.parametrize("name", VISUAL)
def test_every_object_has_a_picture_of_its_own(name):
    seen = set()
    for thing in load_probe(name).objects:
        picture = pixels(Scene((thing,), 0), 64)
        assert (picture != pixels(Scene((), 0), 64)).any(), thing
        seen.add(picture.tobytes())
    assert len(seen) == len(load_probe(name).objects)


def test_what_can_not_be_drawn_is_told():
    with pytest.raises(UserError, match="Unicode has no character named 'sofa'"):
        draw(Scene(("sofa",), 0), 64)
    with pytest.raises(UserError, match="no picture"):
        draw(Scene(("cuneiform sign a",), 0), 64)


def test_the_font_is_part_of_a_run():
    name, digest = scenes_source()
    assert name.startswith("OpenMoji 1")
    assert len(digest) == 16
