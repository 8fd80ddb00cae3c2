"""Who is who: the operator's list of the sites, which superlink.register writes.

SITES_DIR/sites.json, {"<node id>": "site-07", ...}: which key, and so which node, is which site
is known where the keys were made. What a node says about itself is only compared with it.
"""

import json
from pathlib import Path

CURE = "run superlink.register"


class SiteListError(Exception):
    """There is no list that could be used; the message says where and what to do."""


def site_name(partition_id: int) -> str:
    """``site-07`` for partition 7: the name of its folder, and what people read."""
    return f"site-{partition_id:02d}"


def read_site_list(folder: Path) -> dict[int, int]:
    """Node id -> partition id.

    Raises:
        SiteListError: no such file, or it is not what superlink.register writes.
    """
    path = folder / "sites.json"
    try:
        listed = {int(n): _partition_id(site) for n, site in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        raise SiteListError(f"no list of the sites: {path} is missing; {CURE}") from None
    except OSError as err:
        raise SiteListError(f"{path} cannot be read: {err.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise SiteListError(f"{path} does not hold node ids and site names; {CURE}") from None
    if len(set(listed.values())) < len(listed):
        raise SiteListError(f"{path} names one site for two nodes; {CURE}")
    return listed


def _partition_id(site: str) -> int:
    partition_id = int(site.removeprefix("site-"))
    if site != site_name(partition_id) or partition_id < 0:
        raise ValueError(site)
    return partition_id
