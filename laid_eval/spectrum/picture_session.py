"""A spectrum on haystacks of pictures, from described models to a finished run folder."""

from __future__ import annotations

from pathlib import Path

from laid_eval.errors import UserError
from laid_eval.models.load import Described, takes_pictures
from laid_eval.resources import content_hash
from laid_eval.spectra import LoadedSpectrum, PictureSettings, SpectrumSettings
from laid_eval.spectrum.picture_measure import measure_pictures
from laid_eval.spectrum.pictures import Gallery, plan_gallery
from laid_eval.spectrum.running import Progress, Report, refuse_hidden
from laid_eval.spectrum.teacher import compare_on_pictures
from laid_eval.window.scenes import scenes_source


def show_pictures(
    described: Described,
    teacher: Described | None,
    images: int,
    settings: SpectrumSettings,
    folder: Path,
    progress: Report,
) -> LoadedSpectrum:
    """Measure a vision-language model, and compare it with a teacher shown the same.

    Args:
        described: The model.
        teacher: Another that takes pictures, or `None`.
        images: Pictures of a haystack.
        settings: What else was asked for; those on text are refused.
        folder: Of the run.
        progress: Called while measuring.

    Raises:
        UserError: Anything the user can mend.
    """
    for one in (described, teacher):
        if one and not takes_pictures(one):
            raise UserError(
                f"Model {one.source.name!r} ({one.config.model_type}) takes no pictures. Leave --images out and give "
                "--length for a spectrum on text, or take a vision-language model."
            )
    if settings.knockout != "no" or settings.what_if:
        asked = "--knockout" if settings.knockout != "no" else "--what-if"
        raise UserError(f"{asked} is tried on text, not on pictures. Leave it out, or give --length for text.")
    refuse_hidden(described, teacher)
    gallery = plan_gallery(described, images, settings.texts, settings.seed)
    settings = _of_pictures(settings, gallery)
    other = plan_gallery(teacher, images, settings.texts, settings.seed) if teacher else None
    if other and (other.lengths, other.each, other.step) != (gallery.lengths, gallery.each, gallery.step):
        raise UserError(
            f"The models can't be compared on pictures: {images} of them with the question are "
            f"{settings.length:,} tokens for the model and {min(other.lengths):,} for the teacher ({gallery.step} and "
            f"{other.step} positions a picture). Measure each by itself."
        )
    own = measure_pictures(described, settings, gallery, folder, progress)
    if teacher is None or other is None:
        return own
    try:
        theirs = measure_pictures(teacher, settings, other, folder / "teacher", progress)
    except UserError as error:
        raise UserError(f"The teacher can't be measured: {error}") from None
    if own.header.teacher == theirs.header.model:
        return own
    progress(Progress(own.path, "student and teacher", 0, 1))
    return compare_on_pictures(own, theirs, settings.seed)


def _of_pictures(settings: SpectrumSettings, gallery: Gallery) -> SpectrumSettings:
    source, fingerprint = scenes_source()
    shown = PictureSettings(
        images=gallery.images, size=gallery.probe.size, probe=gallery.probe.name, probe_hash=content_hash(gallery.probe)
    )
    found = {"length": min(gallery.lengths), "haystack": source, "haystack_hash": fingerprint, "pictures": shown}
    return settings.model_copy(update=found)
