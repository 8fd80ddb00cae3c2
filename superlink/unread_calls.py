"""Calls whose message is never read: each is one line in the log, with what its headers say.

gRPC's core refuses a message above the port's limit by itself. Of a call with one message Python
hears nothing then; of one with a stream of messages it hears as soon as the headers are there. So
Flower's handlers are announced as the latter, and take the first message.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from superlink.site_keys import fingerprint_of_pem


def telling_unread_calls(
    create: Callable[..., Any], log: Callable[[str], None]
) -> Callable[..., Any]:
    """For Flower's generic_create_grpc_server."""

    def create_telling(*args: Any, interceptors: Any = (), **others: Any) -> Any:
        return create(*args, interceptors=[UnreadCalls(log), *(interceptors or ())], **others)

    return create_telling


class UnreadCalls(grpc.ServerInterceptor):  # type: ignore[misc]
    """Outside of Flower's own interceptors, which know calls with one message only."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        def with_first(messages: Iterator[Any], context: Any) -> Any:
            peer = context.peer()  # which a call that has ended no longer knows
            try:
                request = next(messages, None)
            except grpc.RpcError:  # the call has ended
                request = None
            if request is None:
                name = details.method.rsplit("/", 1)[-1]
                key = _shown(context.invocation_metadata())
                self._log(
                    f"{name} from {peer} with {key} unread: refused as too large, or broken off"
                )
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no message was read")
            return handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(
            with_first, handler.request_deserializer, handler.response_serializer
        )


def _shown(metadata: Any) -> str:
    """The caller's key by its own word: nobody has compared it with a node yet."""
    from flwr.common.constant import PUBLIC_KEY_HEADER
    from flwr.supercore.utils import get_metadata_bytes

    try:
        key = get_metadata_bytes(metadata, PUBLIC_KEY_HEADER) or b""
        return f"{fingerprint_of_pem(key)} (not checked)"
    except Exception:  # a stranger may show anything
        return "no key"
