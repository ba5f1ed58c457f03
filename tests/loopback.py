"""A hub on this machine's loopback address: huggingface_hub's own client talks to it."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED, PRIVATE = "owner/gated", "owner/private"


@contextlib.contextmanager
def hub(repositories):
    """Serve {(kind, "owner/name"): folder} at COMMIT; yields (address, list of paths asked for).

    kind: "models" or "datasets". GATED and PRIVATE answer as the hub does to a stranger.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            listing = parts[0] == "api"
            parts = parts[1:] if listing else parts
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            name, revision, rest = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if name == GATED:
                return self.reply(403, X_Error_Code="GatedRepo")
            folder = repositories.get((kind, name))
            if folder is None:
                return self.reply(401 if name == PRIVATE else 404, X_Error_Code="RepoNotFound")
            if revision != COMMIT:
                return self.reply(404, X_Error_Code="RevisionNotFound")
            if listing:
                files = [path for path in folder.rglob("*") if path.is_file()]
                entries = [
                    {
                        "type": "file",
                        "path": path.relative_to(folder).as_posix(),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in files
                ]
                body = json.dumps(entries).encode()
                return self.reply(200, body, Content_Type="application/json")
            if not (folder / rest).is_file():
                return self.reply(404, X_Error_Code="EntryNotFound")
            body = (folder / rest).read_bytes()
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.reply(200, body, ETag=tag, X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
