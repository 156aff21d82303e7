"""The Ray head of make serve."""

from pathlib import Path

from deployments.local.ray_head import ray_environment


def test_two_servers_on_one_machine_share_no_port_folder_or_token(tmp_path: Path) -> None:
    first, second = ray_environment(tmp_path / "a"), ray_environment(tmp_path / "b")
    own = [n for n in first if n.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE", "_TOKEN"))]
    assert len(own) == 8
    assert all(first[name] != second[name] for name in own)
