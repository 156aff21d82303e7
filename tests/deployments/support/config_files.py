"""A Ray Serve config file with one application."""

from pathlib import Path
from typing import Any

import yaml


def config_file(folder: Path, args: dict[str, Any] | None = None, **more: Any) -> Path:
    path = folder / "config.yaml"
    application = {"import_path": "deployments.app:build_app", "args": args or {}}
    path.write_text(yaml.safe_dump({"applications": [application], **more}))
    return path
