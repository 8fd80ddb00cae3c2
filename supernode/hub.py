"""The hub, or its mirror in HF_ENDPOINT: our token for it, and what its refusals mean.

For ``supernode.download`` and for the evaluation's ``fetch``.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CONNECT_TIMEOUT_S = 10
SAID_CHARACTERS = 200  # of the hub's own words, which may be a page


class HubError(Exception):
    """The hub does not give it; the message is one line: its reason and the way out."""


class OfflineError(HubError):
    """HF_HUB_OFFLINE is set: nobody was asked."""


def find_the_way() -> None:
    """Let pip and the hub's client trust what CA_FILE holds, and take compose's proxies.

    To be called before that client is imported.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings are for who writes code
    path = os.environ.get("CA_FILE")
    if path and Path(path).is_file() and Path(path).stat().st_size:
        for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            os.environ[name] = path
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        if given := os.environ.get(f"HUB_{name}"):
            os.environ |= {name: given, name.lower(): given}


def hub_token() -> str | None:
    """From the file that HF_TOKEN_FILE names (a compose secret, mode 0600).

    Raises:
        OSError: it cannot be read.
        HubError: it holds something else; a client would print it with its complaint.
    """
    path = os.environ.get("HF_TOKEN_FILE")
    if not path:
        return None
    token = Path(path).read_bytes().decode("utf-8-sig", "replace").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError(f"HF_TOKEN_FILE={path}: holds no token, which is one word, as hf_...")
    return token or None


@contextmanager
def asking(repository: str, kind: str, token: str | None) -> Iterator[None]:
    """What the hub's client raises in here becomes one line.

    Args:
        kind: "model" or "dataset".

    Raises:
        HubError: the hub cannot be reached or refuses, or the client cannot write.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        if constants.HF_HUB_OFFLINE:
            raise OfflineError("HF_HUB_OFFLINE forbids to ask the hub")
        _look_whether_it_is_there()
        yield
    except HubError:
        raise
    except HFValidationError:
        raise HubError("the hub has no such names, only ORG/NAME") from None
    except Exception as err:  # hub, network and OS errors have no common class
        raise HubError(_why(err, repository, kind, token)) from None


def _look_whether_it_is_there() -> None:
    """The client itself would try for a minute."""
    import httpx
    from huggingface_hub import constants

    if not re.match(r"https?://[^/]", constants.ENDPOINT):
        shown = constants.ENDPOINT.rpartition("@")[2]  # before it could be a password
        raise HubError(f"HF_ENDPOINT={shown}: an address as https://NAME is needed")
    httpx.head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)


def _why(err: BaseException, repository: str, kind: str, token: str | None) -> str:
    import httpx
    from huggingface_hub import constants, errors, get_token

    while isinstance(err, errors.LocalEntryNotFoundError) and err.__cause__:
        err = err.__cause__  # that it is not in the cache either
    token = token or get_token()
    address = urlsplit(constants.ENDPOINT)
    secrets = [token, address.password, address.username]
    hub = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
    if isinstance(err, errors.HfHubHTTPError):
        said = _plain(err.server_message or "", secrets)
        page = f"{hub}/{'datasets/' * (kind == 'dataset')}{repository}"
        answer = f"{err.response.status_code} ({said})" if said else str(err.response.status_code)
        return f"{hub} says {answer}: {_advice(err, page, bool(token))}"
    reason = _plain(str(err), secrets) or type(err).__name__
    if isinstance(err, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        advice = "check the network, HF_ENDPOINT (a mirror) and CA_FILE (its CA)"
        return f"{hub} cannot be reached ({reason}{_proxy(address.scheme, hub)}): {advice}"
    if isinstance(err, httpx.NetworkError | httpx.TimeoutException | httpx.RemoteProtocolError):
        return f"{hub} broke off ({reason}): run it again, what is whole is kept"
    if isinstance(err, ImportError) and (socks := _socks()):  # httpx has not what it needs for it
        return f"{socks} names a SOCKS proxy, which cannot be used: give one at http://NAME:PORT"
    if isinstance(err, OSError) and err.strerror:
        return f"{err.filename or 'the cache'} cannot be written ({err.strerror})"
    return f"{hub} does not answer as a hub does ({type(err).__name__}): check HF_ENDPOINT"


def _advice(err: "HfHubHTTPError", page: str, with_token: bool) -> str:
    """The way out of a refusal by HTTP."""
    from huggingface_hub import errors

    status = err.response.status_code
    if isinstance(err, errors.RevisionNotFoundError):
        return "that revision is not there, or no longer"
    if isinstance(err, errors.RemoteEntryNotFoundError):
        return "that file is not there, or no longer"
    if isinstance(err, errors.GatedRepoError) and with_token:
        return (
            f"the account of the token in HF_TOKEN_FILE must have accepted the licence at {page}, "
            "and the token must be one that may read gated repositories"
        )
    if isinstance(err, errors.GatedRepoError):
        return f"accept the licence at {page}, and name a file with your token in HF_TOKEN_FILE"
    if status in (401, 403, 404) and with_token:
        return (
            f"is the name right, the token in HF_TOKEN_FILE valid, the licence at {page} accepted?"
        )
    if status in (401, 403, 404):
        return (
            f"is the name right? What is private, or has a licence to be accepted at {page}, needs "
            "a file with a token in HF_TOKEN_FILE"
        )
    if status == 429:
        return "wait some minutes" + ("" if with_token else ", or name a token in HF_TOKEN_FILE")
    return "try again later"


def _proxy(scheme: str, hub: str) -> str:
    """The variable that names the proxy between, not its value: that may hold a password."""
    names = [n for p in (f"{scheme}_proxy", "all_proxy") for n in (p, p.upper())]
    found = next((n for n in names if os.environ.get(n)), "")
    between = found and not proxy_bypass(urlsplit(hub).netloc)
    return f", through the proxy in {found}" if between else ""


def _socks() -> str:
    given = ((n, v) for n, v in os.environ.items() if n.lower().endswith("_proxy"))
    return next((n for n, v in given if v.lower().startswith("socks")), "")


def _plain(text: str, secrets: list[str | None]) -> str:
    """One line of printable characters, without what is nobody's business."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:SAID_CHARACTERS]
