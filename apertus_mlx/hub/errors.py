"""What the Hub client raises, as one line of ours with the right class.

Owns the wording of every failure of the network, of access and of the cache folder.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from apertus_mlx.errors import ApertusError, NotFoundError, ResourceError

_LIMIT_LIFTED = re.compile(r"\bt=(\d{1,9})")
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UnreachableError(NotFoundError):
    """The Hub did not answer, or not properly; the same request may work later.

    Attributes:
        wait_s: where the Hub says that it is busy or fails for the moment, the seconds after which
            it wants to be asked again, 0 where it names none; else None.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@contextmanager
def explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn what the Hub client raises into one line of ours; anything unknown passes through."""
    try:
        yield
    except Exception as error:
        ours = _explain(error, repo_id, revision)
        if ours is None:
            raise
        raise ours from error


def _explain(error: BaseException, repo_id: str, revision: str) -> Exception | None:
    from huggingface_hub import constants, errors

    # hf_hub_download hides the reason in __cause__.
    cause: BaseException = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    # httpx before the client's 2.0, httpx2 since: their classes are told apart by name only.
    kinds = {base.__name__ for base in type(cause).__mro__}
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    hub = constants.ENDPOINT
    login = "log in with `hf auth login`"
    if isinstance(cause, ApertusError):
        return None
    if isinstance(cause, errors.GatedRepoError):
        return NotFoundError(
            f"{repo_id} is gated: accept its licence at {hub}/{repo_id}, then {login}"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return NotFoundError(f"{repo_id} has no branch, tag or commit {revision!r} on {hub}")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return NotFoundError(
            f"{repo_id!r}: no such folder, and no such repository on {hub}; "
            f"if it is private, {login}"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status, headers = cause.response.status_code, cause.response.headers
        return _explain_status(status, headers, repo_id, hub, login)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return NotFoundError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to reach {hub}")
    if "LocalProtocolError" in kinds:  # its text may quote the token
        return NotFoundError(f"{repo_id}: the request is malformed (a bad token?); {login}")
    if "TimeoutException" in kinds:
        return UnreachableError(f"{repo_id}: {hub} did not answer in time; try again")
    if "TransportError" in kinds and ("CERTIFICATE" in reason.upper() or "SSL" in reason.upper()):
        return UnreachableError(
            f"{repo_id}: no secure connection to {hub} ({reason}); check clock, proxy, certificates"
        )
    if "RequestError" in kinds:
        return UnreachableError(
            f"{repo_id}: the connection to {hub} failed ({reason}); "
            "check the network and run again, a download goes on where it stopped"
        )
    if isinstance(cause, errors.FileMetadataError) or "InvalidURL" in kinds:
        return not_the_hub(repo_id)
    if isinstance(cause, ValueError) and "proxy" in reason.lower():
        return NotFoundError(f"{repo_id}: the proxy settings are wrong ({reason})")
    if isinstance(cause, OSError):
        return _explain_os_error(cause, repo_id, reason)
    return None


def not_the_hub(repo_id: str) -> UnreachableError:
    """The error for a server that answers, but not as the Hub does (a portal, a proxy)."""
    from huggingface_hub import constants

    return UnreachableError(
        f"{repo_id}: {constants.ENDPOINT} does not answer like the Hub; "
        "check HF_ENDPOINT and the proxy"
    )


def _explain_status(
    status: int, headers: Mapping[str, str], repo_id: str, hub: str, login: str
) -> NotFoundError:
    wait_s = seconds_to_wait(headers)
    moment = f"wait {wait_s:.0f} s" if wait_s else "wait some minutes"
    words = {
        401: f"refuses the token (HTTP 401); {login}",
        403: f"forbids access (HTTP 403); {login}, or ask for it",
        404: "lacks a file (HTTP 404)",
        429: f"had too many requests (HTTP 429); {moment}, or {login}",
    }.get(status, f"refuses the request (HTTP {status})")
    if status >= 500:
        words = f"fails (HTTP {status}); {f'wait {wait_s:.0f} s' if wait_s else 'try again later'}"
    message = f"{repo_id}: {hub} {words}"
    if status == 429 or status >= 500:
        return UnreachableError(message, wait_s)
    return NotFoundError(message)


def seconds_to_wait(headers: Mapping[str, str]) -> float:
    """The seconds that `Retry-After` or `RateLimit` name; 0 where neither does.

    `Retry-After` holds seconds or a date (RFC 9110); `RateLimit` ends with `t=` and the seconds
    after which the limit is lifted.
    """
    after = headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return float(after[:9])
    try:
        date = parsedate_to_datetime(after)
    except ValueError:
        limit = _LIMIT_LIFTED.search(headers.get("RateLimit", ""))
        return float(limit[1]) if limit else 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _explain_os_error(error: OSError, repo_id: str, reason: str) -> Exception | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{repo_id}: the disk is full; free some space and run again, or set HF_HOME"
        )
    if error.errno in _UNWRITABLE:
        return ResourceError(
            f"{repo_id}: the cache cannot be written ({error.filename}); set HF_HOME"
        )
    if error.errno is None:  # the client's own complaint about a transfer
        return UnreachableError(f"{repo_id}: the download failed ({reason}); run again")
    return None
