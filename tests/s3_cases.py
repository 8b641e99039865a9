"""A server of an object store for tests: a folder's files behind the S3 API, as far as reading needs it.

It takes any signature. Buckets are the folders below its root; it answers ListObjectsV2, HeadObject and GetObject.
"""

import hashlib
import threading
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

XML = "application/xml"
DATE = "2026-01-01T00:00:00.000Z"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        folder = self.server.root / bucket
        self.server.requests[f"{self.command} {bucket}/{key}"] += 1
        if not folder.is_dir():
            self._error(404, "NoSuchBucket")
        elif key:
            self._object(folder / key)
        else:
            self._listing(bucket, {name: values[0] for name, values in parse_qs(url.query).items()})

    do_HEAD = do_GET

    def _object(self, path):
        if not path.is_file():
            self._error(404, "NoSuchKey")
            return
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": formatdate(0, usegmt=True)}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        self._send(status, content, "application/octet-stream", headers)

    def _listing(self, bucket, query):
        folder, prefix, delimiter = self.server.root / bucket, query.get("prefix", ""), query.get("delimiter")
        keys, prefixes = [], set()
        for path in sorted(folder.rglob("*")):
            key = path.relative_to(folder).as_posix()
            if not path.is_file() or not key.startswith(prefix):
                continue
            inner, found, _ = key.removeprefix(prefix).partition(delimiter or "\0")
            if found:
                prefixes.add(f"{prefix}{inner}{delimiter}")
            else:
                keys.append((key, path.stat().st_size))
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>{DATE}</LastModified></Contents>"
            for key, size in keys
        )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(found)}</Prefix></CommonPrefixes>" for found in sorted(prefixes)
        )
        count = f"<KeyCount>{len(keys) + len(prefixes)}</KeyCount><IsTruncated>false</IsTruncated>"
        self._send(
            200, f"<ListBucketResult><Name>{bucket}</Name>{count}{contents}{common}</ListBucketResult>".encode(), XML
        )

    def _error(self, status, code):
        self._send(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), XML)

    def _send(self, status, content, kind, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def object_store(root):
    """Serve the folders below ``root`` as buckets; yields (settings for the environment, the requests so far)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.root, server.requests = root, Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield settings, server.requests
    finally:
        server.shutdown()
        server.server_close()
