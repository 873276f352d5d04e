"""What the site adds to MkDocs: pages from all of the repository, and plainer docstrings."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PAGES = ("*.md", "docs/*.md", "studies/*/*.md")
_BESIDE = (
    "LICENSE",
    "docs/*.css",
    "configs/*.toml",
    "studies/*/results/**/*.png",
)


def on_files(files: Files, config: Any) -> Files:
    """Files stand where they stand in the repository, so that their links hold on the site too."""
    theme = [file for file in files if Path(file.src_dir or "") != _ROOT / "docs"]
    paths = sorted(path for pattern in (*_PAGES, *_BESIDE) for path in _ROOT.glob(pattern))
    ours = [
        File(
            path.relative_to(_ROOT).as_posix(), str(_ROOT), config.site_dir, use_directory_urls=True
        )
        for path in paths
    ]
    return Files([*theme, *ours])


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings, :meth:`step`, are for editors: their text alone is shown."""
    return re.sub(r":(?:attr|class|func|meth|mod):(?=<code>)", "", html)
