"""How far stages are, from what they have left on the disk."""

import json
from pathlib import Path
from typing import Any

from alloy.data.document import FINE
from alloy.data.pipeline import MANIFEST, read_manifest
from alloy.errors import DataError


def stage_folders(folder: Path) -> list[Path]:
    """`folder` itself if a stage wrote it, else the folders of stages in it, by name."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise DataError(
            f"{folder} is no folder of a stage and holds none ({MANIFEST} is missing); name a run or a stage."
        )
    return found


def stage_states(folder: Path) -> list[dict[str, Any]]:
    """Of each stage: status, parts done of all, rows in, out and failed, rows a second of one worker."""
    return [_state(stage) for stage in stage_folders(folder)]


def _state(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    reports = []
    for marker in sorted((folder / "_done").glob("part-*.json")):
        try:
            reports.append(json.loads(marker.read_text())["report"])
        except (ValueError, KeyError, FileNotFoundError):
            # not whole yet
            continue
    rows_in = sum(report.get("rows_in", 0) for report in reports)
    spent = sum(report.get("wall_s", 0.0) for report in reports)
    failed = sum(
        number
        for report in reports
        for name, number in report.get("counts", {}).items()
        if "_status=" in name and name.partition("=")[2] not in FINE
    )
    return {
        "folder": str(folder),
        "stage": manifest.get("stage"),
        "status": manifest.get("status"),
        "parts": f"{len(reports)}/{manifest.get('num_parts')}",
        "rows_in": rows_in,
        "rows_out": sum(report.get("rows_out", 0) for report in reports),
        "failed": failed,
        "lost": sum(sum(report.get("losses", {}).values()) for report in reports),
        "rows_per_s": round(rows_in / spent, 1) if spent else None,
    }
