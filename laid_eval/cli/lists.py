"""`laid-eval models`, `laid-eval probes` and `laid-eval recipes`: what is there."""

from __future__ import annotations

import json

from rich.table import Table

from laid_eval.cli.console import Json, show


def models(as_json: Json = False) -> None:
    """List the reference models: real models that can be had without a model hub."""
    from laid_eval.models.reference import BUNDLED, REFERENCES, install_hint, installed_file

    rows: list[dict[str, object]] = [
        {
            "name": r.name,
            "summary": r.summary,
            "hub_id": r.hub_id,
            "installed": installed_file(r) is not None,
            "install": install_hint(r),
        }
        for r in REFERENCES
    ]
    rows += [
        {"name": b.name, "summary": b.summary, "hub_id": None, "installed": True, "install": None} for b in BUNDLED
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "what it is", "installed", box=None, pad_edge=False)
    for row in rows:
        table.add_row(str(row["name"]), str(row["summary"]), "yes" if row["installed"] else str(row["install"]))
    show(table)


def probes(as_json: Json = False) -> None:
    """List the probes: the kinds of question put to a model."""
    from laid_eval.resources import content_hash
    from laid_eval.window.probes import load_probe, probe_names

    found = [load_probe(name) for name in probe_names()]
    if as_json:
        rows = [{"hash": content_hash(p), **p.model_dump(mode="json")} for p in found]
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "what is asked", "choices", "from", box=None, pad_edge=False)
    for p in found:
        unit = p.unit if p.min_length > 1 else p.unit.removesuffix("s")
        table.add_row(p.name, p.summary, str(p.choices), f"{p.min_length} {unit}")
    show(table)


def recipes(as_json: Json = False) -> None:
    """List the recipes of `laid-eval distill`."""
    from laid_eval.distillation.recipe import load_recipe, recipe_names
    from laid_eval.resources import content_hash

    found = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print(json.dumps([{"hash": content_hash(r), **r.model_dump(mode="json")} for r in found], indent=1))
        return
    table = Table("name", "what is minimised", "trains", box=None, pad_edge=False)
    for r in found:
        learned = r.matches and r.matching.mixture != "same"
        kinds = {"weights": r.training.weights == "all", "mixtures": learned, "gains": r.gain is not None}
        trains = [kind for kind, there in kinds.items() if there]
        table.add_row(r.name, r.summary, ", ".join(trains))
    show(table)
