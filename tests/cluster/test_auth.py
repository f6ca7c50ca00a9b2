"""Who passes where, and where HTTP may be bound without an admin token."""

from __future__ import annotations

import pytest

from lorafleet.cluster.errors import ExposedWithoutToken, Forbidden, Unauthenticated
from lorafleet.cluster.http.auth import Keys, is_loopback

KEYS = Keys(api_keys=("client", "other"), admin_token="admin")


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer  ", "Basic client", "client", "Bearer wrong"])
def test_clients_need_a_key(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated):
        KEYS.check_client(authorization)


def test_clients_with_a_key_pass() -> None:
    KEYS.check_client("Bearer client")
    KEYS.check_client("bearer other")
    Keys().check_client(None)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic admin", "Bearer ädmin"])
def test_the_admin_plane_needs_the_token(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated):
        KEYS.check_admin(authorization)


def test_a_client_key_does_not_open_the_admin_plane() -> None:
    with pytest.raises(Forbidden, match="data plane"):
        KEYS.check_admin("Bearer client")
    KEYS.check_admin("Bearer admin")


def test_without_any_secret_all_is_open_and_without_a_token_alone_the_admin_plane_is_closed() -> None:
    Keys().check_admin(None)
    with pytest.raises(Forbidden, match="LORAFLEET_ADMIN_TOKEN"):
        Keys(api_keys=("client",)).check_admin(None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    Keys().check_exposure([host], ray_has_token=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_beyond_loopback_two_tokens_are_needed(host: str) -> None:
    with pytest.raises(ExposedWithoutToken, match=r"LORAFLEET_ADMIN_TOKEN.*127\.0\.0\.1"):
        Keys(api_keys=("client",)).check_exposure([host], ray_has_token=True)
    with pytest.raises(ExposedWithoutToken, match="RAY_AUTH_MODE=token"):
        KEYS.check_exposure([host], ray_has_token=False)
    KEYS.check_exposure([host], ray_has_token=True)
