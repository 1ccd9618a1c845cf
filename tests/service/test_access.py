import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import jax
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shardinit
from shardinit.errors import ServiceError, SpecError
from shardinit.models import ModelSpec
from shardinit.service.client import transfer
from shardinit.service.server.auth import folder_of
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.server import SERVICE, Server
from shardinit.service.wire.limits import Limits
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2

pytestmark = pytest.mark.once

ONE, TWO, THREE = "first-token-of-many", "second-token-of-many", "third-token-of-many"

NAMED = {"first": ONE, "second": TWO}


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """An authority, and a certificate of a server and of a client that it signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates; it is not here")
    folder = tmp_path_factory.mktemp("pki")
    make_authority(folder, "ca")
    make_signed(folder, "ca", "server")
    make_signed(folder, "ca", "client")
    return folder


def make_authority(folder, name):
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
        *("-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"),
    )


def make_signed(folder, authority, name):
    request = folder / f"{name}.csr"
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", f"/CN={name}", "-keyout", f"{folder}/{name}.key"),
        *("-out", str(request)),
    )
    extension = folder / "san"
    extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(
        *("x509", "-req", "-in", str(request), "-days", "2", "-CAcreateserial"),
        *("-CA", f"{folder}/{authority}.pem", "-CAkey", f"{folder}/{authority}.key"),
        *("-extfile", str(extension), "-out", f"{folder}/{name}.pem"),
    )


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n{ONE}\n\n  {TWO}\n")
    return path


def secured(pki, **more):
    return Config(tls_cert=pki / "server.pem", tls_key=pki / "server.key", **more)


def models(server, tmp_path, **credentials):
    with shardinit.connect(
        server.address, timeout=10, cache_dir=tmp_path / "cache", **credentials
    ) as client:
        return client.models()


def test_tls_is_spoken_and_nothing_else(pki, tmp_path):
    with Server(secured(pki)) as server:
        assert models(server, tmp_path, ca=pki / "ca.pem")
        for wrong in ({}, {"tls": True}):
            with pytest.raises(ServiceError) as caught:
                models(server, tmp_path, **wrong)
            assert caught.value.code == "UNAVAILABLE"


def test_mutual_tls_asks_for_the_client_s_certificate(pki, tmp_path):
    make_authority(tmp_path, "other")
    make_signed(tmp_path, "other", "stranger")
    with Server(secured(pki, client_ca=pki / "ca.pem")) as server:
        ca = pki / "ca.pem"
        own = {"cert": pki / "client.pem", "key": pki / "client.key"}
        assert models(server, tmp_path, ca=ca, **own)
        strange = {"cert": tmp_path / "stranger.pem", "key": tmp_path / "stranger.key"}
        for wrong in ({}, strange):
            with pytest.raises(ServiceError) as caught:
                models(server, tmp_path, ca=ca, **wrong)
            assert caught.value.code == "UNAVAILABLE"


def test_a_replaced_certificate_is_used_without_a_restart(pki, tmp_path):
    for name in ("server.pem", "server.key"):
        shutil.copy(pki / name, tmp_path / name)
    config = Config(tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key")
    with Server(config) as server:
        assert models(server, tmp_path, ca=pki / "ca.pem")
        make_authority(tmp_path, "new")
        make_signed(tmp_path, "new", "server")
        assert models(server, tmp_path, ca=tmp_path / "new.pem")


def test_every_token_of_the_file_opens_and_no_other(tokens, tmp_path):
    with Server(Config(token_file=tokens)) as server:
        for token in (ONE, TWO):
            assert models(server, tmp_path, token=token)
        for wrong in (None, THREE, ONE[:-1], ONE + "x", ""):
            with pytest.raises(ServiceError, match="bearer token") as caught:
                models(server, tmp_path, token=wrong)
            assert caught.value.code == "UNAUTHENTICATED"


def test_tokens_are_replaced_without_a_restart_on_both_sides(tokens, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text(f"  \n  # mine\n\t{ONE}\n")  # as a server may read it
    with (
        Server(Config(token_file=tokens)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path, token=mine) as client,
    ):
        assert client.models()
        tokens.write_text(f"{THREE}\n")
        with pytest.raises(ServiceError):
            client.models()
        mine.write_text(f"{THREE}\n")
        assert client.models()
        tokens.write_text("")  # half-written: what it said before holds
        assert client.models()
        with pytest.raises(ServiceError):
            models(server, tmp_path, token=ONE)


def test_streams_reflection_and_channelz_need_the_token_and_health_does_not(tokens):
    calls = (
        "/shardinit.v1.InitService/StreamShards",
        "/shardinit.v1.InitService/UploadProgram",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    )
    with (
        Server(Config(token_file=tokens)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for name in calls:
            with pytest.raises(grpc.RpcError) as caught:
                channel.stream_stream(name)(iter([b""]), timeout=10).__next__()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == 1


@pytest.mark.slow
def test_a_named_token_has_its_roles_and_may_be_given_others(tmp_path, caplog):
    path, root = tmp_path / "tokens", tmp_path / "root"
    path.write_text(f"reader read {ONE}\nwriter read,write {TWO}\n{THREE}\n")
    config = Config(token_file=path, checkpoint_roots=(root,), allow_upload=True)
    spec = ModelSpec("service-test", {"width": 64})

    def connected(token):
        folder = tmp_path / "cache"
        return shardinit.connect(server.address, cache_dir=folder, token=token)

    def refused(code, call, *given):
        with pytest.raises(ServiceError) as caught:
            call(*given)
        assert caught.value.code == code
        return str(caught.value)

    with Server(config) as server:
        with connected(ONE) as reader, connected(TWO) as writer:
            program = reader.program(spec)
            text = refused(
                "PERMISSION_DENIED", reader.write_checkpoint, spec, 0, root / "x"
            )
            assert "reader may not write" in text
            assert writer.write_checkpoint(spec, 0, root / "writer" / "x").uri
            for elsewhere in ("x", "writer", "reader/x", "writer2/x", "Writer/x"):
                write = writer.write_checkpoint
                refused("PERMISSION_DENIED", write, spec, 0, root / elsewhere)
            assert [path.name for path in root.iterdir()] == ["writer"]
            refused("PERMISSION_DENIED", writer.upload, program)
            path.write_text(f"reader read,upload {ONE}\n")
            assert reader.upload(program) == program.sha256
            refused("UNAUTHENTICATED", writer.models)
        counted = server.metrics.refused
        assert counted.labels("role")._value.get() == 2
        assert counted.labels("unauthenticated")._value.get() == 1


def test_a_certificate_has_the_roles_that_the_file_gives_its_name(pki, tmp_path):
    path, root = tmp_path / "who", tmp_path / "root"
    path.write_text(f"host read cert:localhost\nother read {ONE}\n")
    ca, spec = pki / "ca.pem", ModelSpec("service-test", {"width": 64})
    config = secured(pki, client_ca=ca, token_file=path, checkpoint_roots=(root,))
    own = {"ca": ca, "cert": pki / "client.pem", "key": pki / "client.key"}
    with Server(config) as server:
        assert models(server, tmp_path, **own)
        with pytest.raises(ServiceError) as caught:
            models(server, tmp_path, **own, token=TWO)
        assert caught.value.code == "UNAUTHENTICATED"
        with shardinit.connect(server.address, cache_dir=tmp_path, **own) as client:
            with pytest.raises(ServiceError, match="host may not write"):
                client.write_checkpoint(spec, 0, root / "host" / "x")
            path.write_text("host read,write cert:localhost 3\n")
            assert client.write_checkpoint(spec, 0, root / "host" / "x").uri
            path.write_text("host read cert:elsewhere\n")
            with pytest.raises(ServiceError) as caught:
                client.models()
            assert caught.value.code == "UNAUTHENTICATED"


def test_an_upload_is_its_owners_and_to_others_it_is_not_there(tmp_path):
    path, root = tmp_path / "tokens", tmp_path / "root"
    path.write_text("".join(f"{n} read,upload,write {t}\n" for n, t in NAMED.items()))
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    config = Config(token_file=path, checkpoint_roots=(root,), allow_upload=True)
    with Server(config) as server, contextlib.ExitStack() as stack:

        def connected(name):
            folder, token = tmp_path / name, NAMED[name]
            made = shardinit.connect(server.address, cache_dir=folder, token=token)
            return stack.enter_context(made)

        first, second = map(connected, NAMED)
        place = root / "second" / "x"
        assert first.describe(first.upload(program)).fingerprint
        for digest in (program.sha256, "0" * 64):
            for ask, *given in (
                (second.describe, digest),
                (second.program, digest),
                (second.read, digest, 0, ""),
                (second.write_checkpoint, digest, 0, place),
            ):
                with pytest.raises(ServiceError) as caught:
                    ask(*given)
                assert caught.value.code == "NOT_FOUND"
                assert caught.value.got == f"no program {digest[:16]}… is held here"
        before = server.metrics.uploaded._value.get()
        assert second.upload(program) == program.sha256  # all of it, not its name alone
        assert server.metrics.uploaded._value.get() - before == len(program.to_bytes())
        misses = server.metrics.misses._value
        before = misses.get()
        assert second.describe(program.sha256).fingerprint  # not what first was told
        assert misses.get() == before + 1
        spec = ModelSpec("service-test", {"width": 64})
        shared = first.program(spec).sha256
        assert second.program(shared).sha256 == shared


def test_a_caller_has_the_models_and_roots_that_its_line_leaves_it(pki, tmp_path):
    path, roots = tmp_path / "tokens", [tmp_path / "a", tmp_path / "b"]
    lines = (
        f"first read,upload,write cert:localhost models=service-test roots={roots[0]}",
        f"{ONE} roots={roots[1]}",
    )
    path.write_text("\n".join(lines))
    more = {"client_ca": pki / "ca.pem", "allow_upload": True}
    config = secured(pki, token_file=path, checkpoint_roots=(*roots,), **more)
    spec, other = ModelSpec("service-test", {"width": 64}), ModelSpec("decoder", {})
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    own = {"cert": pki / "client.pem", "key": pki / "client.key", "ca": pki / "ca.pem"}
    with (
        Server(config) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "1", **own) as first,
        shardinit.connect(
            server.address, cache_dir=tmp_path / "2", **own, token=ONE
        ) as second,
    ):
        assert list(first.models()) == ["service-test"]
        assert "decoder" in second.models()
        for ask, *given in (
            (first.describe, other),
            (first.program, other),
            (first.read, other, 0, "x"),
            (first.write_checkpoint, other, 0, roots[0] / "first" / "x"),
            (first.describe, ModelSpec("no-such-model", {})),
        ):
            with pytest.raises(ServiceError, match="first may not use") as caught:
                ask(*given)
            assert caught.value.code == "PERMISSION_DENIED"
            assert caught.value.expected == "one of service-test"
        for writer, place in (
            (first, roots[1] / "first" / "x"),
            (second, roots[0] / "x"),
        ):
            with pytest.raises(ServiceError, match="no folder that the op") as caught:
                writer.write_checkpoint(spec, 0, place)
            assert caught.value.code == "PERMISSION_DENIED"
        assert first.write_checkpoint(spec, 0, roots[0] / "first" / "x").uri
        assert second.write_checkpoint(spec, 0, roots[1] / "x").uri
        with pytest.raises(ServiceError) as caught:  # it may be of any model
            first.describe(second.program(spec).sha256)
        assert caught.value.code == "NOT_FOUND"
        assert first.describe(first.upload(program)).fingerprint


def test_a_root_that_is_none_of_the_server_s_is_refused(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{ONE} roots=/elsewhere\n")
    with pytest.raises(ServiceError, match="no --checkpoint-root") as caught:
        Server(Config(token_file=path, checkpoint_roots=(tmp_path,)))
    assert ONE not in str(caught.value)


def test_a_folder_of_a_caller_is_one_component_that_means_no_other():
    names = ["a", "..", ".", "a/b", "a%2Fb", "spiffe://x/y", ".a", "%2Ea", "ä b"]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[0] == "a"
    assert all("/" not in f and not f.startswith(".") for f in folders)


def test_every_call_is_a_line_that_says_who_what_and_how_much(tokens, caplog):
    tokens.write_text(f"trainer read {ONE}\n")
    caplog.set_level("INFO", "shardinit.service")
    request = service_pb2.GetVersionRequest(min=1, max=1)
    with (
        Server(Config(token_file=tokens)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        ask = InitServiceStub(channel).GetVersion
        answer = ask(request, metadata=(("authorization", f"Bearer {ONE}"),))
        with pytest.raises(grpc.RpcError):
            ask(request, metadata=(("authorization", f"Bearer {TWO}"),))
    lines = [
        vars(r) for r in caplog.records if getattr(r, "method", "") == "GetVersion"
    ]
    told = [
        (x["caller"], x["code"], x["received_bytes"], x["sent_bytes"]) for x in lines
    ]
    assert told == [
        ("trainer", "OK", request.ByteSize(), answer.ByteSize()),
        ("", "UNAUTHENTICATED", 0, 0),
    ]
    for token in (ONE, TWO):
        assert token not in caplog.text


def lines_of(caplog):
    """What was logged of calls, by method, in the order of their ends."""
    found = {}
    for record in caplog.records:
        if hasattr(record, "method"):
            found.setdefault(record.method, []).append(record)
    return found


@pytest.mark.parametrize("method", ["DescribeModel", "UploadProgram"])
def test_a_message_that_grpc_refuses_has_its_line_too(method, tmp_path, caplog):
    caplog.set_level("INFO", "shardinit.service")
    large = b"x" * (Limits().request_bytes + 1)
    with (
        Server(Config(allow_upload=True)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = channel.stream_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([large]), timeout=30, metadata=[("x-request-id", "large")])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (line,) = lines_of(caplog)[method]
    assert (line.request_id, line.code) == ("large", "CANCELLED")
    assert (line.caller, line.received_bytes) == ("ipv4:127.0.0.1", 0)


class Lingering(Front):
    """Takes its time to end a stream after the last message."""

    async def GetProgram(self, request, call):
        async for message in super().GetProgram(request, call):
            yield message
        await asyncio.sleep(0.2)

    async def StreamShards(self, request, call):
        async for message in super().StreamShards(request, call):
            yield message
        await asyncio.sleep(0.2)

    async def WriteCheckpoint(self, request, call):
        async for message in super().WriteCheckpoint(request, call):
            yield message
        await asyncio.sleep(0.2)


def test_a_line_says_what_a_call_was_about_and_that_its_client_read_to_the_end(
    tmp_path, spec, caplog
):
    caplog.set_level("INFO", "shardinit.service")
    root = tmp_path / "root"
    config = Config(checkpoint_roots=(root,), allow_upload=True)
    with (
        Server(config, front=Lingering) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "a") as client,
    ):
        digest = client.program(spec).sha256
        client.program(spec)  # is held: the answer is a header
        assert client.upload(client.program(spec)) == digest
        bias = client.describe(spec).leaf("bias")
        assert next(client.receive(spec, 0, [transfer.full_piece(bias)])).shape == (64,)
        written = client.write_checkpoint(spec, 3, root / "first")
        assert client.write_checkpoint(spec, 3, root / "first") == written
        for uri in ("/else/where", "/x" * 600):
            with pytest.raises((ServiceError, SpecError)):
                client.write_checkpoint(spec, 3, uri)
        with pytest.raises(SpecError):
            client.describe(ModelSpec("a\nmodel OK", {}))
    lines = lines_of(caplog)
    told = {
        name: [
            (x.code, *(vars(x).get(key, "") for key in ("model", "program", "place")))
            for x in found
        ]
        for name, found in lines.items()
    }
    name, first = "service-test", str(root / "first")
    assert told["GetProgram"] == [("OK", name, digest, "")] * 3
    assert told["UploadProgram"] == [("OK", "", digest, "")]
    assert told["StreamShards"] == [("OK", name, "", "")]
    assert told["WriteCheckpoint"] == [
        ("OK", name, "", first),
        ("OK", name, "", first),
        ("PERMISSION_DENIED", name, "", "/else/where"),
        ("INVALID_ARGUMENT", name, "", ("/x" * 600)[:1024]),
    ]
    assert told["DescribeModel"][-1][:2] == ("INVALID_ARGUMENT", "a\nmodel OK")
    text = lines["DescribeModel"][-1].getMessage()
    assert r'model="a\nmodel OK"' in text
    assert "\n" not in text
    assert f"place={first}" in lines["WriteCheckpoint"][0].getMessage()


@pytest.mark.parametrize(
    "text",
    [
        f"name {ONE}",
        f"name read,all {ONE}",
        f"name read {ONE} more",
        f"name read {ONE} models=",
        f"{ONE} roots=,",
        f"models=a {ONE}",
    ],
)
def test_a_line_that_names_no_role_there_is_is_refused(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(f"# who\n{text}\n")
    with pytest.raises(ServiceError, match="line 2: expected TOKEN, or NAME") as caught:
        Server(Config(token_file=path))
    assert ONE not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# none\n", "short\n"])
def test_a_token_file_without_proper_tokens_is_refused(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ServiceError, match="16 characters"):
        Server(Config(token_file=path))
    with pytest.raises(ServiceError, match="No such file"):
        Server(Config(token_file=tmp_path / "none"))


def test_a_token_is_not_sent_in_clear_to_another_machine(tmp_path):
    for target in ("example.com:1", "dns:///10.0.0.1:1", "ipv4:127.0.0.1:1,10.0.0.1:1"):
        with pytest.raises(ServiceError, match="without TLS"):
            shardinit.connect(target, cache_dir=tmp_path, token=ONE)
    shardinit.connect("dns:///localhost:1", cache_dir=tmp_path, token=ONE).close()
    shardinit.connect(
        "10.0.0.1:1", cache_dir=tmp_path, token=ONE, insecure=True
    ).close()


def test_beyond_this_machine_only_with_tls_and_credentials(pki, tokens):
    open_to_all = "0.0.0.0:0"
    for lacking in (
        Config(open_to_all),
        Config(open_to_all, token_file=tokens),
        secured(pki, listen=open_to_all),
    ):
        with pytest.raises(ServiceError, match="other machines") as caught:
            Server(lacking)
        assert caught.value.code == "FAILED_PRECONDITION"
    for enough in (
        Config(open_to_all, insecure=True),
        secured(pki, listen=open_to_all, token_file=tokens),
        secured(pki, listen=open_to_all, client_ca=pki / "ca.pem"),
    ):
        enough.check()
    with Server(secured(pki, listen=open_to_all, token_file=tokens)) as server:
        assert server.address.startswith("0.0.0.0:")


def test_settings_that_contradict_each_other_are_refused(pki):
    for wrong in (
        Config(tls_cert=pki / "server.pem"),
        Config(tls_key=pki / "server.key"),
        Config(client_ca=pki / "ca.pem"),
        Config(metrics_listen="here"),
    ):
        with pytest.raises(ServiceError):
            Server(wrong)
    with pytest.raises(ServiceError, match="not PEM"):
        Server(Config(tls_cert=Path(__file__), tls_key=pki / "server.key"))


def run(*arguments, env=None, **more):
    """Starts ``shardinit serve``; returns the process and its lines on addresses."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shardinit", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | (env or {}),
        **more,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if "serves" in line:
            break
    return process, {line[-3]: line[-1] for line in lines}


def end(process):
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return err


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, tokens):
    """Three settings, each said in fewer places than the one before."""
    file = tmp_path / "serve.toml"
    file.write_text(
        'listen = "256.0.0.1:0"\nhealth-listen = "no"\nlog_format = "json"\n'
        f'token_file = "{tokens}"\n'
    )
    environment = {"SHARDINIT_LISTEN": "255.0.0.1:1", "SHARDINIT_CONFIG": str(file)}
    environment["SHARDINIT_HEALTH_LISTEN"] = "127.0.0.1:0"
    process, addresses = run("--listen", "localhost:0", env=environment)
    try:
        address = addresses["serves"]
        assert address.startswith("localhost:")
        with shardinit.connect(address, cache_dir=tmp_path, token=ONE) as client:
            client.models()
        probe = [sys.executable, "-m", "shardinit", "health", addresses["health"]]
        done = subprocess.run(probe, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "SERVING\n")
    finally:
        err = end(process)
    import json

    lines = [json.loads(line) for line in err.splitlines()]
    (call,) = [line for line in lines if line.get("method") == "ListModels"]
    assert call["code"] == "OK"
    assert len(call["request_id"]) == 32
    done = subprocess.run(probe, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("lisen = 1", "'lisen' is none of"), ("listen =", "Invalid value")],
)
def test_a_faulty_config_file_is_said(tmp_path, text, said):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    command = [sys.executable, "-m", "shardinit", "serve", "--config", str(file)]
    wide = os.environ | {"COLUMNS": "1000"}  # the message is not broken into lines
    done = subprocess.run(command, capture_output=True, text=True, env=wide)
    assert done.returncode == 2
    assert "serve.toml" in done.stderr
    assert said in done.stderr


def serve_with(variables, *arguments):
    """What ``shardinit serve`` says on standard error, and its exit code."""
    command = [sys.executable, "-m", "shardinit", "serve", *arguments]
    wide = os.environ | {"COLUMNS": "1000"} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=wide)
    return done.stderr, done.returncode


def test_a_variable_that_is_no_option_is_named():
    text, code = serve_with({"SHARDINIT_LISEN": "x", "SHARDINIT_WORKER": "2"})
    assert code == 2
    assert "SHARDINIT_LISEN, SHARDINIT_WORKER" in text
    assert "SHARDINIT_WORKERS" in text.partition("none of")[2]


def test_variables_of_kubernetes_and_of_jobs_are_let_through():
    """The refusal is of the address; it comes after the look at the variables."""
    variables = {
        "SHARDINIT_SERVICE_HOST": "10.0.0.1",
        "SHARDINIT_SERVICE_PORT_GRPC": "50051",
        "SHARDINIT_PORT": "tcp://10.0.0.1:50051",
        "SHARDINIT_PORT_50051_TCP_ADDR": "10.0.0.1",
        "SHARDINIT_CANARY_SERVICE_HOST": "10.0.0.2",
        "SHARDINIT_PROCESS_WAIT": "60",
    }
    text, code = serve_with(variables, "--listen", "nowhere")
    assert code == 1
    assert "listen address 'nowhere'" in text


def test_every_setting_is_a_flag_a_variable_and_a_key(tmp_path):
    """One that is wrong in its place is refused by what it was given as."""
    file = tmp_path / "serve.toml"
    file.write_text("workers = 0")
    for text, code in (
        serve_with({}, "--workers", "0"),
        serve_with({"SHARDINIT_WORKERS": "0"}),
        serve_with({}, "--config", str(file)),
    ):
        assert code == 2
        assert "--workers" in text


def test_bytes_take_a_unit_as_a_flag_a_variable_and_a_key(tmp_path):
    """A size that is too small is refused by what it was given as."""
    file = tmp_path / "serve.toml"
    file.write_text('worker_bytes = "100MiB"')
    for text, code in (
        serve_with({}, "--worker-bytes", "100MiB"),
        serve_with({"SHARDINIT_WORKER_BYTES": "100MiB"}),
        serve_with({}, "--config", str(file)),
    ):
        assert code == 2
        assert "--worker-bytes" in text
        assert "100MiB is less than 256 MiB" in text
    text, code = serve_with({}, "--worker-bytes", "1 elephant")
    assert (code, "such as 5GB or 512MiB" in text) == (2, True)
    address = ("--listen", "nowhere")  # refused after the options were read
    text, code = serve_with({}, "--worker-bytes", "1GiB", "--free-bytes=0", *address)
    assert (code, "'nowhere'" in text) == (1, True)
