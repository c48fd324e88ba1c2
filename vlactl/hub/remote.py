"""What the hub says about a model: its files, their sizes and hashes; and what its refusals mean.

A mirror that imitates the hub's interface serves as well. The access token comes from HF_TOKEN or
from where the hub's own tools keep it, and never appears in a message.
"""

from __future__ import annotations

import errno
import fnmatch
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import constants, get_session, get_token, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from vlactl import __version__
from vlactl.config import catalogue
from vlactl.errors import ConfigError, EnvironmentNotReadyError, IntegrityError, UserError
from vlactl.hub.manifest import MANIFEST
from vlactl.hub.models import COMMIT_PATTERN, FILE_PATTERN, ModelName, suggest

DEFAULT_REVISION = "main"
WANTED = ("*.safetensors", "*.json", "tokenizer.model")
TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_LIMIT_PATTERN = re.compile(r";\s*t\s*=\s*(\d+)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# Otherwise the library tells the hub which tools are at work here, and asks it for a list of them.
constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a repository: its SHA-256, or for files that git keeps itself, its blob's SHA-1."""

    name: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files that are wanted of one state of a repository."""

    repo: str
    commit: str
    revision: str
    """As it was asked for: a commit, or the branch that pointed to it."""
    licence: str
    endpoint: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def address(endpoint: str) -> str:
    """Base address of the hub, or of a mirror: the option, else HF_ENDPOINT, else the hub.

    Raises:
        ConfigError: it is no address.
    """
    chosen = (endpoint or constants.ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", chosen):
        raise ConfigError(
            f'"{chosen}" is not the address of a hub', hint="for example: https://huggingface.co"
        )
    return chosen


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return constants.is_offline_mode()


def headers(endpoint: str) -> dict[str, str]:
    """Of every request to a hub."""
    hidden = constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or not _may_have_token(endpoint)
    token = None if hidden else get_token()
    # Compressed answers would make offsets in files meaningless.
    own = {"User-Agent": f"vlactl/{__version__}", "Accept-Encoding": "identity"}
    return own | ({"Authorization": f"Bearer {token}"} if token else {})


def _may_have_token(endpoint: str) -> bool:
    """Whether nobody on the way can read the token: over plain http, everybody can."""
    parts = urlsplit(endpoint)
    return parts.scheme == "https" or parts.hostname in _LOCAL_HOSTS


def file_url(listing: Listing, file: RemoteFile) -> str:
    """Where a file is."""
    return f"{listing.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(file.name)}"


def describe(name: ModelName, endpoint: str) -> Listing:
    """Ask what a repository has.

    Raises:
        UserError: there is no answer, or no safetensors.
    """
    revision = name.revision or DEFAULT_REVISION
    url = f"{endpoint}/api/models/{name.repo}/revision/{quote(revision, safe='')}"
    try:
        response = get_session().get(
            url, params={"blobs": "true"}, headers=headers(endpoint), timeout=TIMEOUT
        )
        hf_raise_for_status(response)
        answer = response.json()
    except (httpx2.HTTPError, OSError) as error:
        raise explain(error, name, endpoint) from error
    except ValueError as error:
        raise _is_no_hub(endpoint) from error
    return _listing(name, revision, endpoint, answer)


def _listing(name: ModelName, revision: str, endpoint: str, answer: Any) -> Listing:
    try:
        commit, siblings = answer["sha"], answer["siblings"]
        names = [str(each["rfilename"]) for each in siblings]
        wanted = _wanted(name.repo, names)
        files = {each["rfilename"]: _file(each) for each in siblings if each["rfilename"] in wanted}
    except (TypeError, KeyError, ValueError) as error:
        raise _is_no_hub(endpoint) from error
    if not isinstance(commit, str) or not COMMIT_PATTERN.fullmatch(commit):
        raise _is_no_hub(endpoint)
    if name.is_pinned and commit != name.revision:
        raise IntegrityError(f"{endpoint} answered {name} with the commit {commit}")
    if not any(each.endswith(".safetensors") for each in files):
        raise _has_no_weights(name, names)
    return Listing(
        repo=name.repo,
        commit=commit,
        revision=revision,
        licence=_licence(name.repo, answer),
        endpoint=endpoint,
        files=_with_known_hashes(name, commit, tuple(files.values())),
    )


def _wanted(repo: str, names: list[str]) -> set[str]:
    """Files of the top folder that a model consists of: no code, no pickles, no extra copies."""
    entry = catalogue.find(repo)
    patterns = [*WANTED, *(entry.also if entry else ())]
    return {
        name
        for name in names
        if FILE_PATTERN.fullmatch(name)
        and name != MANIFEST
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _file(sibling: dict[str, Any]) -> RemoteFile:
    large = sibling.get("lfs") or {}
    if not isinstance(large, dict):
        raise TypeError("lfs is not a table")
    size = large.get("size", sibling["size"])
    digest = large["sha256"] if large else sibling["blobId"]
    if not isinstance(size, int) or size < 0 or not isinstance(digest, str):
        raise ValueError("neither a size nor a hash")
    return RemoteFile(
        name=sibling["rfilename"],
        size=size,
        sha256=digest if large else "",
        git_sha1="" if large else digest,
    )


def _with_known_hashes(
    name: ModelName, commit: str, files: tuple[RemoteFile, ...]
) -> tuple[RemoteFile, ...]:
    """What the catalogue knows about the commit goes before what the hub says."""
    entry = catalogue.find(name.repo)
    known = entry.sha256 if entry and entry.revision == commit else {}
    return tuple(
        RemoteFile(
            name=file.name,
            size=file.size,
            sha256=known.get(file.name, file.sha256),
            git_sha1=file.git_sha1,
        )
        for file in files
    )


def _licence(repo: str, answer: dict[str, Any]) -> str:
    """The catalogue's word and that of the model's page."""
    entry = catalogue.find(repo)
    card = answer.get("cardData")
    on_page = card.get("license") if isinstance(card, dict) else None
    said = [entry.licence] if entry else []
    if on_page:
        said.append(("its page says " if entry else "") + _printable(on_page))
    return "; ".join(said) or "none is stated"


def _printable(value: object) -> str:
    """What a stranger wrote, as a terminal may be given it."""
    return re.sub(r"[^ -~]", "?", str(value))[:80]


# --------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------
def seconds_to_wait(error: HfHubHTTPError) -> int | None:
    """After which time a refusal says to ask again."""
    after = error.response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return int(after)
    limit = _LIMIT_PATTERN.search(error.response.headers.get("RateLimit", ""))
    return int(limit[1]) if limit else None


def explain(error: Exception, name: ModelName, endpoint: str, file: str = "") -> UserError:
    """The one message that a failure ends in."""
    if isinstance(error, OfflineModeIsEnabled):
        return EnvironmentNotReadyError(
            f"{name} is not here, and HF_HUB_OFFLINE forbids the network", hint="unset it"
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, name, endpoint, file)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentNotReadyError(
            f"the disk became full while {file} was loaded: {error.filename or ''}".rstrip(": "),
            hint="free some space and repeat the command: it goes on where it stopped",
        )
    if isinstance(error, httpx2.HTTPError):
        reason = str(error) or type(error).__name__
        return EnvironmentNotReadyError(
            f"cannot load {file or name} from {endpoint}: {reason}",
            hint="is the network up? Repeat the command: it goes on where it stopped; a mirror: "
            "--endpoint URL",
        )
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    where = getattr(error, "filename", None) or name
    return EnvironmentNotReadyError(f"cannot load {file or name}: {reason}: {where}")


def _refusal(error: HfHubHTTPError, name: ModelName, endpoint: str, file: str) -> UserError:
    status = error.response.status_code
    what = f"{file} of {name}" if file else str(name)
    if status in (401, 403):
        return EnvironmentNotReadyError(
            f"{endpoint} gives {what} to some accounts only, or has no such model ({status})",
            hint=f"{_join(suggest(name.repo))}accept its terms on {endpoint}/{name.repo}, and set "
            "HF_TOKEN to a token of that account"
            + ("" if _may_have_token(endpoint) else "; over plain http it is not sent: use https"),
        )
    if status == 404 and file:
        return EnvironmentNotReadyError(
            f"{endpoint} lists {file} of {name} but does not have it (404)",
            hint="try without --endpoint, or another mirror",
        )
    if status == 404:
        return _is_unknown(error, name, endpoint)
    if status == 429:
        seconds = seconds_to_wait(error)
        when = f"in {seconds} seconds" if seconds is not None else "in a few minutes"
        return EnvironmentNotReadyError(
            f"{endpoint} refuses more requests for now (429)",
            hint=f"repeat the command {when}: it goes on where it stopped; with HF_TOKEN set the "
            "limit is higher",
        )
    return EnvironmentNotReadyError(
        f"{endpoint} answers {status} for {what}",
        hint="repeat the command later: it goes on where it stopped",
    )


def _is_unknown(error: HfHubHTTPError, name: ModelName, endpoint: str) -> UserError:
    if error.response.headers.get("X-Error-Code") == "RevisionNotFound":
        revision = name.revision or DEFAULT_REVISION
        return ConfigError(
            f'{name.repo} has no revision "{revision}" on {endpoint} (404)',
            hint=f"its newest: vlactl download {name.repo}@{DEFAULT_REVISION}",
        )
    return ConfigError(
        f"there is no model {name.repo} on {endpoint} (404)",
        hint=suggest(name.repo) or "vlactl download lists the catalogue",
    )


def _has_no_weights(name: ModelName, names: list[str]) -> UserError:
    pickles = [each for each in names if any(fnmatch.fnmatchcase(each, p) for p in _PICKLES)]
    if not pickles:
        return ConfigError(
            f"{name} has no weights: there is no .safetensors file in its top folder"
        )
    return ConfigError(
        f"{name} has pickles only ({_printable(pickles[0])}), which may run any code when they are "
        "loaded",
        hint="vlactl loads safetensors only: ask its authors for them",
    )


def _is_no_hub(endpoint: str) -> UserError:
    return EnvironmentNotReadyError(
        f"{endpoint} does not answer as the hub does",
        hint="check --endpoint and HF_ENDPOINT; behind a login page or a proxy, sign in first",
    )


def _join(sentence: str) -> str:
    return f"{sentence} " if sentence else ""
