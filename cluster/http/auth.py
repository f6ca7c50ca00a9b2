"""Authentication: keys of the data plane, the token of the admin plane, and where HTTP may be bound without one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from lorafleet.cluster.errors import ExposedWithoutToken, Forbidden, Unauthenticated

CALLER_DIGITS = 16
"""Hex digits of a key's digest that stand for its caller."""

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Who sent the request that this task serves, as `check_client` told."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets of one service. Comparisons take the same time wherever two secrets differ."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys of the data plane; none: it is open."""
    admin_token: str | None = field(default=None, repr=False)
    """None: the admin plane is open too, unless there are keys for the data plane."""
    admin_token_env: str = "LORAFLEET_ADMIN_TOKEN"

    def check_client(self, authorization: str | None) -> str:
        """Check the key of a request to the data plane. Raises Unauthenticated.

        Returns a digest of the key, which identifies the caller; empty where no key is needed.
        """
        CALLER.set("")
        if not self.api_keys:
            return ""
        token = _bearer(authorization)
        if token is None or not self._is_client(token):
            raise Unauthenticated("a valid API key is needed: Authorization: Bearer <key>")
        caller = hashlib.sha256(token.encode()).hexdigest()[:CALLER_DIGITS]
        CALLER.set(caller)
        return caller

    def check_admin(self, authorization: str | None) -> None:
        """Check the token of a request to the admin plane. Raises Unauthenticated; Forbidden for a data-plane key."""
        if self.admin_token is None and not self.api_keys:
            return
        token = _bearer(authorization)
        if self.admin_token is not None and _is_same(token, self.admin_token):
            return
        if self._is_client(token):
            raise Forbidden("an API key of the data plane does not open the admin plane; send the admin token")
        if self.admin_token is None:
            raise Forbidden(f"the admin plane is closed: no token is set in {self.admin_token_env}")
        raise Unauthenticated("the admin token is needed: Authorization: Bearer <token>")

    def _is_client(self, token: str | None) -> bool:
        matches = [_is_same(token, key) for key in self.api_keys]
        return any(matches)

    @property
    def are_none(self) -> bool:
        """True if everybody who reaches HTTP may do everything."""
        return self.admin_token is None and not self.api_keys

    def check_exposure(self, hosts: Iterable[str], *, ray_has_token: bool) -> None:
        """Refuse to be reachable from beyond this machine without an admin token, or on a Ray that anybody may use.

        Raises ExposedWithoutToken.
        """
        exposed = [host for host in hosts if not is_loopback(host)]
        if not exposed:
            return
        if self.admin_token is None:
            raise ExposedWithoutToken(
                f"HTTP is bound to {exposed[0]}, beyond loopback, and the admin plane has no token: set "
                f"{self.admin_token_env} in the environment of the Ray cluster (or in runtime_env.env_vars), or bind "
                "HTTP to 127.0.0.1 (http_options.host)"
            )
        if not ray_has_token:
            raise ExposedWithoutToken(
                f"HTTP is bound to {exposed[0]}, beyond loopback, and Ray has no token: whoever reaches its ports runs "
                "code here. Set RAY_AUTH_MODE=token before `ray start` on every node, and make the token with "
                "`ray get-auth-token --generate`"
            )


def is_loopback(host: str) -> bool:
    """True if an address or name that a server binds is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may be anything


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _is_same(given: str | None, secret: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), secret.encode())
