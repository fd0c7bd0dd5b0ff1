"""Who may see the page and press its buttons: the checks that a request passes before anything answers it.

A page of this machine shows and steers its peers, so another site in the same browser, or another user of the machine,
must not reach it: a token that only the printed address has, the name in Host (against DNS rebinding), the Origin, and
for every change JSON from our own page. A public page has no token: it can only be read, and shows
nothing private.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_YEAR_S = 365 * 86400

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Guard:
    """The checks of one server. host, port: where it listens, known once it does."""

    public: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def cookie(self) -> str:
        """Name of the cookie; cookies know no ports, and a machine may have several pages."""
        return f"p2pllm-{self.port}"

    def refusal(self, request: web.Request) -> web.Response | None:
        """Why a request is not answered; None if it may be."""
        if not self.public and request.headers.get("Host", "").lower() not in self._hosts():
            return _refused(403, "This page is for the machine that it runs on; open the printed address.")
        if not self._is_own_origin(request):
            return _refused(403, "Another site's page asked for this; open the printed address.")
        if request.method == "POST" and (why := self._post_refusal(request)) is not None:
            return why
        if not self.public and not self._is_known(request):
            return _refused(401, "Open the whole address that `p2pllm dashboard` printed, with its token.")
        return None

    def _hosts(self) -> set[str]:
        ports = (f":{self.port}", "") if self.port == 80 else (f":{self.port}",)
        return {name + port for name in (*_LOOPBACK, self.host) for port in ports}

    def _is_own_origin(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        if origin is None:
            return True
        hosts = {request.headers.get("Host", "").lower()} if self.public else self._hosts()
        return origin.lower() in {f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")}

    def _post_refusal(self, request: web.Request) -> web.Response | None:
        if self.public:
            return _refused(403, "A public page can only be read.")
        if request.content_type != "application/json":
            return _refused(415, "Changes are sent as application/json.")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if "Origin" not in request.headers or site != "same-origin":
            return _refused(403, "Changes are taken from the page itself only.")
        return None

    def _is_known(self, request: web.Request) -> bool:
        return self.is_token(request.cookies.get(self.cookie, "")) or (
            request.path == "/" and self.is_token(request.query.get("token", ""))
        )

    def is_token(self, given: str) -> bool:
        """Whether this is the token, in the same time for every wrong one."""
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def entry(self, request: web.Request) -> web.Response | None:
        """For an address with a token: keep it in a cookie and go on without it, so that no history has it.

        The cookie is Lax, as a browser that comes from a file (`serving.door`) would not show a Strict one here.
        """
        if self.public or "token" not in request.query:
            return None
        response = web.Response(status=303, headers={"Location": "/"})
        response.set_cookie(self.cookie, self.token, max_age=_YEAR_S, httponly=True, samesite="Lax", path="/")
        return response

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what passes."""
        refusal = self.refusal(request)
        return await handler(request) if refusal is None else refusal


def _refused(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every answer tells the browser what the page may do, refusals and errors, too."""
    response.headers.update(HEADERS)
