// The Node SDK and the clock example against docs/protocol.md: real plugin processes, and a host made of raw frames that shares
// no code with the SDK. Run with `node --test tests/sdk/`.

import assert from 'node:assert/strict';
import { createPrivateKey, createPublicKey, sign as signBytes } from 'node:crypto';
import { once } from 'node:events';
import { cpSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { FrameDecoder, LicenseError, Plugin, encodeFrame, fromNode, isSigned, splitToken, verifyLicense } from '../../sdk/node/plugrack.mjs';
import { GOLDEN, INSTANCE, MIB, Process, ROOT, Wire, check, frame, http, startPlugin, withId } from './fake_host.mjs';

/** The packages from npm that `make test-tools` installs. */
const PACKAGES = process.env.PLUGRACK_TEST_PACKAGES ?? join(ROOT, 'target/test-packages');

// What is under test runs this. Its paths are named for what the tests do with them.
const FIXTURE = `
import { HttpError, Plugin, PluginError, Refuse, Reply } from './plugrack.mjs';
import { Readable } from 'node:stream';
import { setInterval, setTimeout } from 'node:timers/promises';

const plugin = new Plugin({ id: 'fixture', name: 'Fixture', version: '1.0.0', icon: '🧪', route: '/fixture', concurrency: 8 });
const AsyncFunction = (async () => {}).constructor;
let release, produced = 0;
const held = new Promise((resolve) => (release = resolve));

async function* ticks(signal) {
  try {
    for await (const _ of setInterval(5, null, { signal })) yield 'tick';
  } finally {
    console.error('ticks released');
  }
}
async function* obstinate() {
  try {
    for (;;) yield (await setTimeout(1), 'more');
  } finally {
    console.error('obstinate released');
  }
}
async function* flood() {
  for (;; produced++) yield Buffer.alloc(65536);
}
async function* breaking() {
  yield 'one';
  throw new Error('broken in the middle');
}

const paths = {
  '/text': () => 'grüße\\n',
  '/bytes': () => new Uint8Array([0, 255, 10]),
  '/json': () => ({ a: [1, 'ü'] }),
  '/null': () => null,
  '/nothing': () => {},
  '/promise': () => new Reply(Promise.resolve('slip')),
  '/request': (r) => ({ method: r.method, path: r.path, query: r.query, q: r.params.getAll('q'), mount: r.mount, remote: r.remote,
    headers: [...r.headers], cookie: r.headers.get('Cookie'), tags: r.headers.get('X-Tag'), each: r.headers.getAll('x-tag'),
    none: r.headers.get('x') }),
  '/cookies': () => new Reply(null, { status: 204, headers: { 'set-cookie': ['a=1', 'b=2'] } }),
  '/pairs': () => new Reply('x', { headers: [['Set-Cookie', 'a=1'], ['Content-Type', 'text/css'], ['Set-Cookie', 'b=2']] }),
  '/number': (r) => r.query,
  '/slow-number': async (r) => (await setTimeout(r.query % 3), r.query),
  '/echo': async (r) => new Reply(await r.body({ limit: 64 * ${MIB} })),
  '/limited': async (r) => r.text({ limit: 10 }),
  '/parsed': async (r) => r.json(),
  '/pieces': async (r) => {
    const sizes = [];
    for await (const piece of r) sizes.push(piece.length);
    return sizes;
  },
  '/cut': async (r) => {
    try { await r.body(); } catch (error) { console.error('cut:', error.name, r.signal.aborted); throw error; }
  },
  '/early': () => new Reply('enough', { status: 202 }),
  '/late-reader': (r) => new Reply((async function* () {
    yield 'begun ';
    try { await r.body(); } catch (error) { yield error.name; }
  })()),
  '/big': () => Buffer.alloc(2.5 * ${MIB}, 'big'),
  '/three': () => new Reply(['one', Buffer.from('two'), '', 'three'].values(), { headers: { 'content-type': 'text/x-three' } }),
  '/big-piece': () => new Reply([Buffer.alloc(2 * ${MIB} + 5, 'x')].values()),
  '/ticks': (r) => new Reply(ticks(r.signal)),
  '/obstinate': () => new Reply(obstinate()),
  '/readable': () => new Reply(Readable.from(['a', 'b']).on('close', () => console.error('readable closed'))),
  '/flood': () => new Reply(flood()),
  '/produced': () => String(produced),
  '/hold': async () => (await held, 'held'),
  '/release': () => (release(), 'released'),
  '/later': async () => (await setTimeout(50), 'later'),
  '/patient': async (r) => setTimeout(60_000, 'never', { signal: r.signal }),
  '/fails': () => { throw new Error('a bug'); },
  '/teapot': () => { throw new HttpError(418, 'short and stout'); },
  '/breaks': () => new Reply(breaking()),
  '/bad-piece': () => new Reply([5].values()),
  '/long-header': () => new Reply('', { headers: { 'x-long': 'x'.repeat(70000) } }),
  // Runs a snippet with the store at hand.
  '/run': async (r) => {
    const outcome = await new AsyncFunction('kv', await r.text())(plugin.kv)
      .catch(({ name, code, message, index }) => ({ name, code, message, index }));
    return new Reply(JSON.stringify(outcome ?? null, (_, v) => (typeof v === 'bigint' ? v + 'n' : v)));
  },
};

plugin.onHttp((request) => (paths[request.path] ?? (() => new Reply('?', { status: 404 })))(request));
plugin.onInit((context) => {
  if (context.config.refuse) throw new Refuse('no licence, no service', 'no_license');
  if (context.config.crash) throw new TypeError('init is broken');
  if (context.config.show) console.error(JSON.stringify(context));
  if (context.config.guard) {
    plugin.onKv(async (operation) => {
      if (operation.key === 'forbidden') throw new PluginError('forbidden', 'not for you');
      if (operation.key === 'bug') throw new Error('a bug in onKv');
      if (operation.key === 'odd') throw new PluginError('Bad Code!', '');
      if (operation.key === 'long') throw new PluginError('long', 'é'.repeat(5000));
      if (operation.key === 'sparse') return {};
      if (operation.key === 'computed') return { found: true, value: 'computed:' + operation.op };
      return plugin.kv.perform(operation);
    });
  }
});
plugin.run();
`;

const installFixture = (dir) => writeFileSync(join(dir, 'plugin.mjs'), FIXTURE);

/** Starts a process that ends with the test; by default the fixture. */
const start = (t, options) => startPlugin(t, { install: installFixture, ...options });

// The fake store -------------------------------------------------------------------------------------------------------

/** The host's socket: a store in memory that answers in order, and does `disturb` before each answer. */
async function hostStore(t, path) {
  const store = { entries: new Map(), requests: [], connections: 0, disturb: async () => {} };
  let rev = 0;
  const set = (key, value) => (store.entries.set(key, { value: Buffer.from(value), rev: ++rev }), { rev });
  const operations = {
    get: ({ key }) => {
      const entry = store.entries.get(key);
      return entry ? [{ found: true, rev: entry.rev, expires_in_ms: entry.ttl }, entry.value] : [{ found: false }];
    },
    set: (head, body) => {
      if (head.if_absent && store.entries.has(head.key)) return [{ type: 'error', code: 'conflict', message: 'it is there' }];
      const result = set(head.key, body);
      store.entries.get(head.key).ttl = head.ttl_ms;
      return [result];
    },
    delete: ({ key }) => [{ found: store.entries.delete(key) }],
    incr: ({ key, delta }) => {
      const value = BigInt(store.entries.get(key)?.value.toString() ?? 0) + BigInt(delta);
      set(key, String(value));
      return [{ value, rev }];
    },
    list: ({ prefix = '', after = '', values }) => {
      const keys = [...store.entries.keys()].sort().filter((key) => key.startsWith(prefix) && key > after);
      const page = keys.slice(0, 2).map((key) => {
        const { value, rev } = store.entries.get(key);
        return { key, rev, size: value.length, value_base64: values ? value.toString('base64') : undefined };
      });
      return [{ next: keys.length > 2 ? page[1].key : undefined }, JSON.stringify(page)];
    },
    // Only shows what it was asked to do; a sum is always one that a number cannot hold.
    txn: (_, body) => {
      store.transaction = JSON.parse(body);
      const failing = store.transaction.findIndex((write) => write.if_rev === 999);
      if (failing >= 0) return [{ type: 'error', code: 'conflict', message: 'no such revision', index: failing }];
      const results = store.transaction.map(({ op }) => ({ value: op === 'incr' ? 9007199254740993n : undefined, rev: ++rev }));
      return [{}, json(results)];
    },
  };
  // A host with 64-bit integers writes all their digits.
  const json = (value) => JSON.stringify(value, (_, v) => (typeof v === 'bigint' ? `#${v}#` : v)).replace(/"#(-?\d+)#"/g, '$1');

  const server = createServer(async (socket) => {
    store.connections++;
    const wire = new Wire(socket);
    for (let request; (request = await wire.receive()); ) {
      store.requests.push(request.head);
      await store.disturb(wire);
      if (socket.destroyed) return;
      const [fields, body] = operations[request.head.op](request.head, request.body);
      socket.write(frame(json({ type: 'result', id: request.head.id, ...fields }), body));
    }
  });
  server.listen(path);
  await once(server, 'listening');
  t.after(() => server.close());
  return store;
}

// Frames ---------------------------------------------------------------------------------------------------------------

describe('frames', () => {
  const hex = (text) => Buffer.from(text, 'hex');
  const decode = (chunks) => {
    const decoder = new FrameDecoder();
    return chunks.flatMap((chunk) => [...decoder.push(chunk)]).map(({ head, body }) => ({ head, body: body.toString('hex') }));
  };

  for (const { name, hex: bytes, head, means, body_hex: body } of GOLDEN.valid) {
    check(`valid: ${name}`, () => {
      const whole = hex(bytes);
      const frames = [{ head: means ?? head, body }];
      assert.deepEqual(decode([whole]), frames);
      assert.deepEqual(decode([...whole].map((byte) => Buffer.of(byte))), frames, 'byte by byte');
      assert.deepEqual(decode([whole, Buffer.concat([whole, whole])]).length, 3);
      // Some heads are not in the form in which this library writes them, or hold integers beyond 2^53.
      if (whole.includes(JSON.stringify(head))) assert.equal(Buffer.concat(encodeFrame(head, hex(body))).toString('hex'), bytes);
    });
  }
  for (const { name, hex: bytes } of GOLDEN.invalid.filter(({ to, says }) => to === 'any' && !says.includes('unknown message type'))) {
    check(`invalid: ${name}`, () => assert.throws(() => decode([hex(bytes)]), { code: 'protocol_error' }));
  }
  for (const { name, hex: bytes } of GOLDEN.cut) {
    check(`cut: ${name}`, () => assert.deepEqual(decode([hex(bytes)]), []));
  }

  check('cut anywhere, they are the same', () => {
    const bodies = [0, 1, 40000, MIB].map((size) => Buffer.alloc(size, 'abc'));
    const stream = Buffer.concat(bodies.flatMap((body, id) => encodeFrame({ type: 'data', id }, body)));
    for (const step of [7, 100, 65536, stream.length]) {
      const chunks = [];
      for (let at = 0; at < stream.length; at += step) chunks.push(stream.subarray(at, at + step));
      assert.deepEqual(decode(chunks).map(({ body }) => body), bodies.map((body) => body.toString('hex')));
    }
  });

  check('what does not fit a frame is refused', () => {
    assert.throws(() => encodeFrame({ type: 'data', id: 1 }, Buffer.alloc(MIB + 1)), { code: 'too_large' });
    assert.throws(() => encodeFrame({ type: 'error', id: 1, message: 'x'.repeat(65536) }), { code: 'too_large' });
  });
});

// The process ----------------------------------------------------------------------------------------------------------

describe('the process', () => {
  check('before init every other frame closes its connection', async (t) => {
    const plugin = start(t);
    for (const { name, hex } of GOLDEN.invalid.filter(({ to, place }) => to === 'any' || (to === 'plugin' && place === 'start'))) {
      const wire = await plugin.connect();
      wire.socket.write(Buffer.from(hex, 'hex'));
      assert.equal(await wire.receive(), null, name);
    }
    assert.equal((await plugin.init()).reply.head.type, 'ready');
  });

  check('--metadata prints one object and exits 0', async (t) => {
    const plugin = start(t, { args: ['--metadata'] });
    assert.equal(await plugin.exit, 0);
    assert.deepEqual(JSON.parse(plugin.out), {
      id: 'fixture', name: 'Fixture', version: '1.0.0', icon: '🧪', route: '/fixture', protocol: 1, concurrency: 8,
    });
  });

  check('a plugin may have host names in place of a route', async (t) => {
    const source = `import { Plugin } from './plugrack.mjs';
      new Plugin({
        id: 'p', name: 'P', version: '1', icon: 'p', host: ['p.example', '*.p.example'], belowRoute: 'rewrite', trailingSlash: 'redirect',
      }).run();`;
    const plugin = start(t, { args: ['--metadata'], install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), source) });
    assert.equal(await plugin.exit, 0);
    const { route, host, below_route: belowRoute, trailing_slash: trailingSlash } = JSON.parse(plugin.out);
    assert.deepEqual([route, host, belowRoute, trailingSlash], [undefined, ['p.example', '*.p.example'], 'rewrite', 'redirect']);
  });

  check('it serves 16 requests at once unless told otherwise', async (t) => {
    for (const [given, expected] of [['', 16], [', concurrency: 1', 1]]) {
      const source = `import { Plugin } from './plugrack.mjs';
        new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p'${given} }).run();`;
      const plugin = start(t, { args: ['--metadata'], install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), source) });
      assert.equal(await plugin.exit, 0);
      assert.equal(JSON.parse(plugin.out).concurrency, expected);
    }
  });

  check('a want of files is waited out, and said once', async (t) => {
    // Whatever path is asked for, the listener fails as libuv makes it fail.
    const source = `import { Server } from 'node:net';
      import { Plugin } from './plugrack.mjs';
      const listen = Server.prototype.listen;
      let server;
      Server.prototype.listen = function (...args) { return listen.apply((server = this), args); };
      const plugin = new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p' });
      plugin.onHttp(({ path }) => {
        if (path !== '/') server.emit('error', Object.assign(new Error('accept ' + path.slice(1)), { code: path.slice(1) }));
        return 'served';
      });
      plugin.run();`;
    const plugin = start(t, { install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), source) });
    const first = await plugin.ready();
    for (const code of ['EMFILE', 'ENFILE', 'ENOMEM', 'ECONNABORTED']) {
      assert.equal(await first.text(`/${code}`), 'served');
      // A new connection, as soon as it listens again; the old one goes on.
      const next = await plugin.connect();
      assert.equal(await next.text('/'), 'served');
      assert.equal(await first.text('/'), 'served');
    }
    assert.equal(plugin.log, 'plugrack: cannot accept connections, and tries again: accept EMFILE\n');
    // What does not pass ends the plugin, for the host to start another.
    first.send(http(1, '/EINVAL'));
    assert.equal(await plugin.exit, 1);
    assert.match(plugin.log, /cannot accept connections on .*: accept EINVAL\n$/);
  });

  check('without PLUGRACK_SOCKET it says so and exits 64', async (t) => {
    const plugin = start(t, { env: { PLUGRACK_SOCKET: '' } });
    assert.equal(await plugin.exit, 64);
    assert.match(plugin.log, /^fixture: PLUGRACK_SOCKET is not set.*\n$/);
  });

  check('init hands the context to onInit and answers ready', async (t) => {
    const plugin = start(t);
    await plugin.ready({ show: true });
    await plugin.logged('\n');
    assert.deepEqual(JSON.parse(plugin.log), {
      instanceId: INSTANCE, pluginId: 'fixture', socketPath: plugin.socketPath,
      hostSocket: plugin.hostPath, logPath: '/dev/null', dataDir: plugin.dir, license: null, config: { show: true },
      host: { name: 'fake', version: '0' }, notBeforeTime: null, granted: null,
    });
  });

  check('Refuse answers error, says why and exits 78', async (t) => {
    const plugin = start(t);
    const { reply } = await plugin.init({ refuse: true });
    assert.deepEqual(reply.head, { type: 'error', id: 0, code: 'no_license', message: 'no licence, no service' });
    assert.equal(await plugin.exit, 78);
    assert.equal(plugin.log, 'no licence, no service\n');
  });

  check('any other error in onInit answers error, shows the stack and exits 1', async (t) => {
    const plugin = start(t);
    const { reply } = await plugin.init({ crash: true });
    assert.deepEqual(reply.head, { type: 'error', id: 0, code: 'internal', message: 'init is broken' });
    assert.equal(await plugin.exit, 1);
    assert.match(plugin.log, /TypeError: init is broken\n\s+at .*plugin\.mjs/);
  });

  check('shutdown finishes what is under way on every connection and exits 0', async (t) => {
    const plugin = start(t);
    const wires = [await plugin.ready(), await plugin.connect(), await plugin.connect(), await plugin.connect()];
    const [idle, busy, streaming, patient] = wires;
    streaming.send(http(5, '/ticks'));
    assert.equal((await streaming.receive()).head.type, 'response');
    patient.send(http(6, '/patient'));
    busy.send(http(7, '/later'));
    busy.send(http(8, '/text'));
    wires.forEach((wire) => wire.send({ type: 'shutdown', id: 9 }));

    assert.equal(await idle.receive(), null);
    assert.equal((await busy.receive()).body.toString(), 'later');
    assert.equal((await busy.receive()).body.toString(), 'grüße\n');
    assert.equal(await busy.receive(), null);
    let last;
    for (let next; (next = await streaming.receive()); last = next);
    assert.equal(last.head.more, false, 'a stream that heeds the signal ends properly');
    assert.equal((await patient.receive()).head.status, 503);
    assert.equal(await plugin.exit, 0);
    assert.equal(plugin.log, 'ticks released\n');
  });

  check('shutdown on one connection leaves the others', async (t) => {
    const plugin = start(t);
    const [first, second] = [await plugin.ready(), await plugin.connect()];
    assert.equal(await second.text('/text'), 'grüße\n');
    assert.equal(await first.call({ type: 'shutdown', id: 1 }), null);
    assert.equal(await second.text('/text'), 'grüße\n');
    assert.equal(await second.call({ type: 'shutdown', id: 2 }), null);
    assert.equal(await plugin.exit, 0);
  });

  check('SIGTERM ends it at once', async (t) => {
    const plugin = start(t);
    const wire = await plugin.ready();
    wire.send(http(1, '/obstinate'));
    await wire.receive();
    plugin.child.kill('SIGTERM');
    assert.equal(await plugin.exit, 'SIGTERM');
  });

  check('before init nothing else is in place, and init only once', async (t) => {
    const plugin = start(t);
    assert.equal(await (await plugin.connect()).call({ type: 'ping', id: 1 }), null);
    const wire = await plugin.ready();
    assert.equal(await wire.call({ type: 'init', id: 2, protocol: 1 }), null);
    assert.equal(await (await plugin.connect()).text('/text'), 'grüße\n');
  });
});

// HTTP -----------------------------------------------------------------------------------------------------------------

describe('http', () => {
  let plugin;
  before(async () => {
    plugin = new Process({ install: installFixture });
    await plugin.ready();
  });
  after(() => plugin.stop());

  const json = (wire, path, fields, body) => wire.text(path, fields, body).then(JSON.parse);

  check('results become responses', async () => {
    const wire = await plugin.connect();
    const summary = async (path) => {
      const { status, headers, body } = await wire.get(path);
      return [status, headers, body.toString('latin1')];
    };
    const typed = (type) => [['content-type', type]];
    assert.deepEqual(await summary('/text'), [200, typed('text/plain; charset=utf-8'), Buffer.from('grüße\n').toString('latin1')]);
    assert.deepEqual(await summary('/bytes'), [200, typed('application/octet-stream'), '\0\xff\n']);
    assert.deepEqual(await summary('/json'), [200, typed('application/json'), Buffer.from('{"a":[1,"ü"]}').toString('latin1')]);
    assert.deepEqual(await summary('/null'), [200, [], '']);
    assert.deepEqual(await summary('/teapot'), [418, typed('text/plain; charset=utf-8'), 'short and stout\n']);
    assert.deepEqual(await summary('/none'), [404, typed('text/plain; charset=utf-8'), '?']);
    assert.deepEqual(await summary('/cookies'), [204, [['set-cookie', 'a=1'], ['set-cookie', 'b=2']], '']);
    assert.deepEqual((await summary('/pairs'))[1], [['Set-Cookie', 'a=1'], ['Content-Type', 'text/css'], ['Set-Cookie', 'b=2']]);
  });

  check('a handler that fails answers 500 and shows the stack', async () => {
    const wire = await plugin.connect();
    for (const [path, complaint] of [
      ['/fails', /Error: a bug\n\s+at .*plugin\.mjs/],
      ['/nothing', /TypeError: a reply cannot be undefined/],
      ['/promise', /TypeError: a reply cannot be an instance of Promise/],
    ]) {
      const { status, body } = await wire.get(path);
      assert.deepEqual([status, body.toString()], [500, 'internal error\n']);
      while (!complaint.test(plugin.log)) await once(plugin.child.stderr, 'data');
    }
  });

  check('the request is what the host sent', async () => {
    const wire = await plugin.connect();
    const headers = [['x-tag', 'a'], ['cookie', 'c=1'], ['x-tag', 'b'], ['cookie', 'd=2']];
    assert.deepEqual(await json(wire, '/request?q=1&q=%C3%BC', { method: 'PURGE', headers }), {
      method: 'PURGE', path: '/request', query: 'q=1&q=%C3%BC', q: ['1', 'ü'], mount: '/fixture', remote: '192.0.2.7',
      headers, cookie: 'c=1; d=2', tags: 'a, b', each: ['a', 'b'], none: null,
    });
    assert.equal((await json(wire, '/request')).query, '');
  });

  check('fifty requests in one write are answered in order', async () => {
    const wire = await plugin.connect();
    wire.socket.write(Buffer.concat(Array.from({ length: 50 }, (_, id) => frame(http(id, `/slow-number?${id}`)))));
    for (let id = 0; id < 50; id++) {
      const { head, body } = await wire.receive();
      assert.deepEqual([head.id, body.toString()], [id, String(id)]);
    }
  });

  check('connections are served side by side', async () => {
    const [slow, quick] = [await plugin.connect(), await plugin.connect()];
    slow.send(http(1, '/patient'));
    assert.equal(await quick.text('/text'), 'grüße\n');
    slow.close();
  });

  check('every byte of a body comes back', async () => {
    const wire = await plugin.connect();
    const all = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
    for (const body of [Buffer.alloc(0), all, Buffer.alloc(16384, all), Buffer.alloc(16385, all), Buffer.alloc(MIB, all)]) {
      const { body: answer, frames } = await wire.get('/echo', { method: 'POST' }, body);
      assert.ok(answer.equals(body));
      assert.equal(frames.length, 1);
    }
  });

  const post = (wire, path, pieces) => {
    wire.send(http(1, path, { method: 'POST', more: true }), pieces[0]);
    pieces.slice(1).forEach((piece, at) => wire.send({ type: 'data', id: 1, more: at < pieces.length - 2 }, piece));
    return wire.answer();
  };

  check('a body that streams up comes whole, or piece by piece', async () => {
    const wire = await plugin.connect();
    const pieces = [3, MIB, 0, MIB, 70000, 0].map((size, at) => Buffer.alloc(size, String(at)));
    const { headers, frames, body } = await post(wire, '/echo', pieces);
    assert.ok(body.equals(Buffer.concat(pieces)));
    assert.deepEqual(frames.map((each) => each.length), [MIB, MIB, 70003, 0]);
    assert.deepEqual(headers.find(([name]) => name === 'content-length'), ['content-length', String(body.length)]);
    assert.equal((await post(wire, '/pieces', pieces)).body.toString(), JSON.stringify([3, MIB, MIB, 70000]));
  });

  check('a body over the limit answers 413, one that is not JSON 400', async () => {
    const wire = await plugin.connect();
    assert.equal(await wire.text('/limited', {}, 'ten bytes.'), 'ten bytes.');
    assert.equal((await wire.get('/limited', {}, 'ten bytes..')).status, 413);
    assert.equal(await wire.text('/parsed', {}, '{"a":1}'), '{"a":1}');
    assert.equal((await wire.get('/parsed', {}, '{"a":')).status, 400);
  });

  check('an early answer drops the rest of the body', async () => {
    const wire = await plugin.connect();
    wire.send(http(1, '/early', { method: 'POST', more: true }), 'some');
    const { head, body } = await wire.receive();
    assert.deepEqual([head.status, body.toString()], [202, 'enough']);
    wire.send({ type: 'data', id: 1, more: true }, Buffer.alloc(MIB));
    wire.send({ type: 'data', id: 1, more: false, aborted: true });
    assert.equal(await wire.text('/text'), 'grüße\n');
  });

  check('a body cannot be read once the answer has begun', async () => {
    const wire = await plugin.connect();
    wire.send(http(1, '/late-reader', { method: 'POST', more: true }), 'some');
    wire.send({ type: 'data', id: 1, more: false, aborted: true });
    assert.equal((await wire.answer()).body.toString(), 'begun AbortError');
    assert.equal(await wire.text('/late-reader', {}, 'whole'), 'begun AbortError', 'nor one that is there');
  });

  check('a body that is cut rejects, and the plugin goes on', async () => {
    const wire = await plugin.connect();
    wire.send(http(1, '/cut', { method: 'POST', more: true }), 'some');
    wire.close();
    await plugin.logged('cut: AbortError true\n');
    assert.equal(await (await plugin.connect()).text('/text'), 'grüße\n');
  });

  check('another request inside a body is a protocol error', async () => {
    const wire = await plugin.connect();
    wire.send(http(1, '/echo', { method: 'POST', more: true }), 'some');
    assert.equal(await wire.call(http(2, '/text')), null);
  });

  check('a large answer goes in frames of 1 MiB, with its length', async () => {
    const { headers, frames } = await (await plugin.connect()).get('/big');
    assert.deepEqual(frames.map((each) => each.length), [MIB, MIB, MIB / 2, 0]);
    assert.deepEqual(headers.at(-1), ['content-length', String(2.5 * MIB)]);
  });

  check('a stream is sent piece by piece', async () => {
    const wire = await plugin.connect();
    const { headers, frames } = await wire.get('/three');
    assert.deepEqual(headers, [['content-type', 'text/x-three']]);
    assert.deepEqual(frames.map(String), ['', 'one', 'two', 'three', '']);
    assert.deepEqual((await wire.get('/big-piece')).frames.map((each) => each.length), [0, MIB, MIB, 5, 0]);
    assert.equal(await wire.text('/readable'), 'ab');
  });

  check('HEAD has the head of GET, and leaves streams unread', async () => {
    const wire = await plugin.connect();
    const { headers, frames } = await wire.get('/big', { method: 'HEAD' });
    assert.deepEqual(frames.map((each) => each.length), [0]);
    assert.deepEqual(headers.at(-1), ['content-length', String(2.5 * MIB)]);
    assert.deepEqual((await wire.get('/flood', { method: 'HEAD' })).frames.map(String), ['']);
    const logged = plugin.log.split('readable closed').length;
    assert.equal(await wire.text('/readable', { method: 'HEAD' }), '');
    while (plugin.log.split('readable closed').length === logged) await once(plugin.child.stderr, 'data');
    assert.equal(await wire.text('/produced'), '0');
  });

  check('an answer that fails in the middle ends with an error, and the connection goes on', async () => {
    const wire = await plugin.connect();
    for (const [path, code, message, complaint] of [
      ['/breaks', 'internal', 'broken in the middle', 'Error: broken in the middle\n'],
      ['/bad-piece', 'internal', 'expected a string or bytes, not 5', 'TypeError: expected a string or bytes, not 5\n'],
      ['/long-header', 'too_large', /^a frame's head has \d+ bytes, over 65536$/, ''],
    ]) {
      wire.send(http(1, path));
      let last;
      do last = (await wire.receive()).head;
      while (last.more === true);
      assert.deepEqual([last.type, last.id, last.code], ['error', 1, code]);
      assert.match(last.message, new RegExp(message));
      await plugin.logged(complaint);
      assert.equal(await wire.text('/text'), 'grüße\n');
    }
  });

  check('when the connection ends in a stream, its generator is returned', async () => {
    for (const [path, trace] of [['/ticks', 'ticks released\n'], ['/obstinate', 'obstinate released\n']]) {
      const wire = await plugin.connect();
      wire.send(http(1, path));
      while ((await wire.receive()).body.length === 0);
      wire.close();
      await plugin.logged(trace);
    }
    assert.equal(await (await plugin.connect()).text('/text'), 'grüße\n');
    assert.doesNotMatch(plugin.log, /AbortError:/, 'that is no fault to be logged');
  });

  check('a stream waits for a host that does not read', async () => {
    const [flood, other] = [await plugin.connect(), await plugin.connect()];
    flood.send(http(1, '/flood'));
    await flood.receive();
    for (let before = -1, now; (now = Number(await other.text('/produced'))) !== before; before = now);
    assert.ok(Number(await other.text('/produced')) < 32, 'pieces of 64 KiB');
    flood.close();
  });

  check('requests wait in the socket when the queue is full', async () => {
    const [full, other] = [await plugin.connect(), await plugin.connect()];
    full.send(http(0, '/hold'));
    for (let id = 1; id <= 16; id++) full.send(http(id, '/echo'), Buffer.alloc(MIB, String(id)));
    for (let before = -1; full.socket.writableLength !== before; await other.text('/text')) before = full.socket.writableLength;
    assert.ok(full.socket.writableLength > 8 * MIB);
    assert.equal(await other.text('/release'), 'released');
    assert.equal((await full.receive()).body.toString(), 'held');
    for (let id = 1; id <= 16; id++) assert.ok((await full.receive()).body.equals(Buffer.alloc(MIB, String(id))));
  });

  check('ping', async () => {
    const wire = await plugin.connect();
    assert.deepEqual((await wire.call({ type: 'ping', id: 11 })).head, { type: 'pong', id: 11 });
    wire.socket.write(Buffer.from(GOLDEN.valid.find(({ name }) => name === 'ping').hex, 'hex'));
    assert.deepEqual((await wire.receive()).head, { type: 'pong', id: 3 });
  });

  check('a protocol error closes its connection, and only that', async () => {
    const other = await plugin.connect();
    const before = plugin.log.split('protocol error: ').length;
    let tried = 0;
    for (const { name, hex, place } of GOLDEN.invalid.filter(({ to, place }) => to === 'any' || (to === 'plugin' && place !== 'start'))) {
      const wire = await plugin.connect();
      if (place === 'body') wire.send(http(7, '/echo', { method: 'POST', more: true }), 'begin');
      wire.socket.write(Buffer.from(hex, 'hex'));
      assert.equal(await wire.receive(), null, name);
      tried++;
    }
    assert.ok(tried > 25);
    while (plugin.log.split('protocol error: ').length - before < tried) await once(plugin.child.stderr, 'data');
    for (const { hex } of GOLDEN.cut) (await plugin.connect()).socket.end(Buffer.from(hex, 'hex'));
    assert.equal(await other.text('/text'), 'grüße\n');
  });
});

// Cancellation ---------------------------------------------------------------------------------------------------------

/** A plugin of some concurrency with a stream that no signal ends, but the request `/release`. */
const BLOCKING = (concurrency) => `
import { Plugin, Reply } from './plugrack.mjs';

const plugin = new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p', concurrency: ${concurrency} });
let release;
const released = new Promise((resolve) => (release = resolve));

async function* blocked(signal) {
  try {
    yield 'begun';
    signal.addEventListener('abort', () => console.error('aborted'));
    await released;
    yield 'more';
    console.error('went on');
  } finally {
    console.error('returned');
  }
}

plugin.onHttp(({ path, signal }) => (path === '/blocked' ? new Reply(blocked(signal)) : 'hello'));
process.on('SIGUSR2', () => release());
plugin.run();
`;

describe('a request that the host gives up', () => {
  const blocking = (t, concurrency) =>
    start(t, { install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), BLOCKING(concurrency)) });

  /** How often the plugin has logged something. */
  const count = (plugin, text) => plugin.log.split(text).length - 1;

  /** Reads the beginning of a stream that then blocks, and closes the connection. */
  async function abandon(plugin, wire) {
    const before = count(plugin, 'aborted');
    wire.send(http(1, '/blocked'));
    while ((await wire.receive()).body.length === 0);
    wire.close();
    while (count(plugin, 'aborted') === before) await once(plugin.child.stderr, 'data');
  }

  check('aborts its signal, and its generator is returned where it next yields', async (t) => {
    const plugin = blocking(t, 2);
    await abandon(plugin, await plugin.ready());
    plugin.child.kill('SIGUSR2');
    await plugin.logged('returned\n');
    assert.equal(plugin.log, 'aborted\nreturned\n');
  });

  check('makes room for others, until there are twice as many handlers as the concurrency', async (t) => {
    for (const concurrency of [1, 2]) {
      const plugin = blocking(t, concurrency);
      await abandon(plugin, await plugin.ready());
      for (let i = 1; i < 2 * concurrency; i++) {
        const wire = await plugin.connect();
        assert.equal(await wire.text('/'), 'hello');
        await abandon(plugin, wire);
      }
      const gone = await plugin.connect();
      const wire = await plugin.connect();
      gone.close();
      wire.send(http(1, '/'));
      await plugin.logged('no connection is served until a handler ends: ');
      assert.match(plugin.log, new RegExp(`: ${2 * concurrency} handlers still run for requests that the host has given up, `));
      assert.equal(wire.socket.readableLength, 0);
      plugin.child.kill('SIGUSR2');
      assert.equal((await wire.answer()).body.toString(), 'hello');
      assert.equal(count(plugin, 'no connection is served'), 1);
    }
  });

  check('does not keep the plugin from its exit', async (t) => {
    const plugin = blocking(t, 1);
    await abandon(plugin, await plugin.ready());
    assert.equal(await (await plugin.connect()).call({ type: 'shutdown', id: 2 }), null);
    assert.equal(await plugin.exit, 0);
  });
});

// The store ------------------------------------------------------------------------------------------------------------

describe('kv', () => {
  /** A plugin and its store; `run` runs a snippet in the plugin. */
  async function withStore(t, config) {
    const plugin = start(t);
    const store = await hostStore(t, plugin.hostPath);
    const wire = await plugin.ready(config);
    return { plugin, store, wire, run: async (snippet) => JSON.parse(await wire.text('/run', { method: 'POST' }, snippet)) };
  }

  check('a reply that is invalid closes the connection, and its call fails', async (t) => {
    const calls = { 'kv get': `kv.get('a')`, 'kv set': `kv.set('a', 'b')`, 'kv incr': `kv.incr('a')` };
    const plugin = start(t);
    const replies = [];
    const closed = [];
    const server = createServer((socket) => {
      const wire = new Wire(socket);
      wire.receive().then(async ({ head: { id } }) => {
        socket.write(withId(replies.shift(), id));
        closed.push(await wire.receive());
      });
    }).listen(plugin.hostPath);
    t.after(() => server.close());
    const wire = await plugin.ready();
    for (const { name, hex, place } of GOLDEN.invalid.filter(({ to }) => to === 'any' || to === 'caller')) {
      replies.push(Buffer.from(hex, 'hex'));
      const outcome = JSON.parse(await wire.text('/run', { method: 'POST' }, `return ${calls[place] ?? calls['kv get']}`));
      assert.ok(['disconnected', 'protocol_error'].includes(outcome?.code), `${name}: ${JSON.stringify(outcome)}`);
      while (closed.length === 0) await delay(1);
      assert.equal(closed.pop(), null, name);
    }
  });

  check('every call, in the form the protocol has', async (t) => {
    const { store, run } = await withStore(t);
    assert.equal(await run(`return kv.get('a')`), null);
    assert.equal(await run(`return kv.set('a', 'ü', { ttlMs: 5000, ifAbsent: true })`), 1);
    assert.deepEqual(store.requests.at(-1), { type: 'kv', id: 2, op: 'set', key: 'a', ttl_ms: 5000, if_absent: true });
    assert.equal(await run(`return (await kv.get('a')).toString()`), 'ü');
    assert.deepEqual(await run(`const { value, ...rest } = await kv.getEntry('a'); return rest`), { rev: 1, expiresInMs: 5000 });
    assert.equal(await run(`return kv.set('empty', new Uint8Array(0), { ifRev: 7 })`), 2);
    assert.equal(store.requests.at(-1).if_rev, 7);
    assert.equal(await run(`return (await kv.get('empty')).length`), 0);
    assert.deepEqual(await run(`return [await kv.delete('a', { ifRev: 1 }), await kv.delete('a')]`), [true, false]);
    assert.deepEqual(await run(`return [await kv.incr('n'), await kv.incr('n', -3, { ttlMs: 9 })]`), [1, -2]);
    assert.deepEqual(await run(`return kv.incr('n', Number.MAX_SAFE_INTEGER)`), Number.MAX_SAFE_INTEGER - 2);
    assert.deepEqual(await run(`return kv.incr('n', 4)`), '9007199254740993n');
  });

  check('list fetches page by page', async (t) => {
    const { store, run } = await withStore(t);
    await run(`for (const key of ['b', 'pa', 'pb', 'pc', 'pd', 'pe']) await kv.set(key, 'of ' + key)`);
    const list = (options) => run(`
      const all = [];
      for await (const entry of kv.list(${options})) all.push({ ...entry, value: entry.value?.toString() });
      return all;`);
    assert.deepEqual((await list('')).map(({ key }) => key), ['b', 'pa', 'pb', 'pc', 'pd', 'pe']);
    store.requests.length = 0;
    const found = await list(`{ prefix: 'p', values: true }`);
    assert.deepEqual(found[1], { key: 'pb', rev: 3, size: 5, value: 'of pb' });
    assert.equal(found.length, 5);
    assert.deepEqual(store.requests.map(({ after }) => after), [undefined, 'pb', 'pd']);
    assert.deepEqual(await list(`{ prefix: 'q' }`), []);
  });

  check('txn writes together, and tells which write failed', async (t) => {
    const { store, run } = await withStore(t);
    assert.deepEqual(await run(`
      return kv.txn([
        { op: 'set', key: 'a', value: '1', ttlMs: 5 },
        { op: 'set', key: 'b', value: Buffer.from([255]) },
        { op: 'incr', key: 'n', delta: 2 },
      ])`), [{ rev: 1 }, { rev: 2 }, { value: '9007199254740993n', rev: 3 }]);
    assert.deepEqual(store.transaction, [
      { op: 'set', key: 'a', value: '1', ttl_ms: 5 }, { op: 'set', key: 'b', value_base64: '/w==' }, { op: 'incr', key: 'n', delta: 2 },
    ]);
    assert.deepEqual(await run(`return kv.txn([{ op: 'delete', key: 'a' }, { op: 'delete', key: 'b', ifRev: 999 }])`), {
      name: 'PluginError', code: 'conflict', message: 'no such revision', index: 1,
    });
  });

  check('calls made side by side go over one connection and get their own answers', async (t) => {
    const { store, run } = await withStore(t);
    const numbers = Array.from({ length: 300 }, (_, n) => n);
    assert.deepEqual(await run(`
      const numbers = Array.from({ length: 300 }, (_, n) => n);
      await Promise.all(numbers.map((n) => kv.set('k' + n, 'v' + n)));
      const values = await Promise.all(numbers.map((n) => kv.get('k' + n)));
      return values.map((value) => Number(value.toString().slice(1)));`), numbers);
    assert.equal(store.connections, 1);
  });

  check("errors have the host's code, and what cannot be sent fails by itself", async (t) => {
    const { run, store } = await withStore(t);
    await run(`return kv.set('a', '1')`);
    assert.deepEqual(await run(`
      const code = (call) => call.then(() => 'done', (error) => error.code ?? error.name);
      return Promise.all([
        code(kv.set('a', '2', { ifAbsent: true })), code(kv.set('b', Buffer.alloc(${MIB} + 1))), code(kv.get('\\ud800')),
        code(kv.get('x'.repeat(70000))), code(kv.set('c', { not: 'bytes' })), code(kv.get('a')),
      ]);`), ['conflict', 'too_large', 'bad_key', 'too_large', 'TypeError', 'done']);
    assert.equal(store.connections, 1);
  });

  check('a lost connection fails what is outstanding; the next call connects again', async (t) => {
    const { store, run } = await withStore(t);
    let count = 0;
    store.disturb = (wire) => ++count === 2 && wire.close();
    assert.deepEqual(await run(`
      const calls = await Promise.allSettled([kv.set('a', '1'), kv.set('b', '2'), kv.set('c', '3')]);
      return calls.map(({ value, reason }) => value ?? reason.code);`), [1, 'disconnected', 'disconnected']);
    assert.equal(await run(`return kv.set('d', '4')`), 2);
    assert.deepEqual(store.requests.map(({ key }) => key), ['a', 'b', 'd'], 'nothing is sent again');
    assert.equal(store.connections, 2);
  });

  check('a reply that answers no request ends the connection', async (t) => {
    const { store, run } = await withStore(t);
    store.disturb = (wire) => wire.send({ type: 'result', id: 999 });
    assert.equal((await run(`return kv.get('a')`)).code, 'protocol_error');
    store.disturb = () => {};
    assert.equal(await run(`return kv.get('a')`), null);
  });

  check('without a host the call fails', async (t) => {
    const plugin = start(t);
    const wire = await plugin.ready();
    assert.match(await wire.text('/run', {}, `return kv.get('a')`), /"disconnected".*ENOENT/);
  });

  check("the operator's operations go to the store by default", async (t) => {
    const { wire } = await withStore(t);
    const kv = async (op, key, body) => {
      const reply = await wire.call({ type: 'kv', id: 9, op, key }, body);
      return [reply.head, reply.body.toString()];
    };
    const result = (fields) => ({ type: 'result', id: 9, ...fields });
    assert.deepEqual(await kv('get', 'color'), [result({ found: false }), '']);
    assert.deepEqual(await kv('set', 'color', 'grün'), [result({ rev: 1 }), '']);
    assert.deepEqual(await kv('get', 'color'), [result({ found: true, rev: 1 }), 'grün']);
    assert.deepEqual(await kv('delete', 'color'), [result({ found: true }), '']);
    assert.deepEqual(await kv('delete', 'color'), [result({ found: false }), '']);
    assert.equal((await kv('dance', 'color'))[0].code, 'bad_request');
  });

  check('onKv checks, refuses and computes', async (t) => {
    const { plugin, wire } = await withStore(t, { guard: true });
    const kv = async (key) => wire.call({ type: 'kv', id: 9, op: 'get', key });
    assert.deepEqual((await kv('forbidden')).head, { type: 'error', id: 9, code: 'forbidden', message: 'not for you' });
    assert.deepEqual((await kv('bug')).head, { type: 'error', id: 9, code: 'internal', message: 'a bug in onKv' });
    assert.equal((await kv('computed')).body.toString(), 'computed:get');
    assert.deepEqual((await kv('odd')).head, { type: 'error', id: 9, code: 'internal', message: 'internal' });
    assert.deepEqual((await kv('long')).head, { type: 'error', id: 9, code: 'long', message: 'é'.repeat(2048) });
    assert.deepEqual((await kv('sparse')).head, { type: 'result', id: 9, found: false });
    assert.deepEqual((await kv('other')).head, { type: 'result', id: 9, found: false });
    await plugin.logged('Error: a bug in onKv');
    assert.doesNotMatch(plugin.log, /not for you/);
  });
});

// Licences -------------------------------------------------------------------------------------------------------------

describe('licences', () => {
  // The seed 0, 1, … 31, in the form in which Node takes a raw Ed25519 key.
  const seed = Buffer.from(Array.from({ length: 32 }, (_, index) => index));
  const header = Buffer.from('302e020100300506032b657004220420', 'hex');
  const vendor = createPrivateKey({ key: Buffer.concat([header, seed]), format: 'der', type: 'pkcs8' });
  const publicKey = `k4.public.${createPublicKey(vendor).export({ format: 'jwk' }).x}`;
  const keyring = { 'k-1': publicKey };
  const claims = {
    v: 1, jti: 'L-1', iss: 'Acme', aud: 'fixture', inst: [INSTANCE], sub: 'Customer', iat: '2026-01-01T00:00:00Z', feat: ['export'],
    lim: { users: 25 },
  };
  const vectors = (name) => JSON.parse(readFileSync(join(ROOT, 'tests/protocol', name), 'utf8'));

  /** A token, made as PASETO says and without the SDK. The payload is claims to add to `claims`, or bytes. */
  function sign(payload, footer = '{"kid":"k-1"}') {
    const body = payload instanceof Uint8Array ? payload : Buffer.from(JSON.stringify({ ...claims, ...payload }));
    const pieces = ['v4.public.', body, footer, 'plugrack/plugin-licence/v1'].map((piece) => Buffer.from(piece));
    const sizes = [pieces.length, ...pieces.map((piece) => piece.length)].map((size) => {
      const bytes = Buffer.alloc(8);
      bytes.writeUInt32LE(size);
      return bytes;
    });
    const signed = Buffer.concat([sizes[0], ...pieces.flatMap((piece, index) => [sizes[index + 1], piece])]);
    const whole = Buffer.concat([body, signBytes(null, signed, vendor)]).toString('base64url');
    return `v4.public.${whole}.${Buffer.from(footer).toString('base64url')}`;
  }

  /** The standing of a token, or the code it is refused with, and its days left. */
  function verdict(token, options = {}) {
    try {
      const now = new Date(options.now ?? '2026-06-01T00:00:00Z');
      const { standing, daysLeft } = verifyLicense(token, { keyring, pluginId: 'fixture', instanceId: INSTANCE, ...options, now });
      return [standing, daysLeft];
    } catch (error) {
      if (!(error instanceof LicenseError)) throw error;
      assert.equal(error.message, `licence: ${error.code}: ${error.what}`);
      assert.doesNotMatch(error.message, /[\r\n]/);
      assert.ok(!token || !error.message.includes(token));
      return [error.code, null];
    }
  }

  check('the framing passes the official vectors', () => {
    const signed = vectors('paseto_v4_public.json').tests.filter(({ name }) => name.startsWith('4-S-'));
    assert.equal(signed.length, 3);
    for (const { name, token, payload: said, footer: foot, 'public-key': hex, 'implicit-assertion': implicit } of signed) {
      const { payload, signature, footer } = splitToken(token);
      const [key, assertion, space] = [Buffer.from(hex, 'hex'), Buffer.from(implicit), Buffer.from(' ')];
      assert.equal(isSigned(payload, footer, assertion, signature, key), true, name);
      assert.deepEqual(JSON.parse(payload), typeof said === 'string' ? JSON.parse(said) : said, name);
      assert.equal(footer.toString(), foot, name);
      assert.equal(isSigned(Buffer.concat([payload, space]), footer, assertion, signature, key), false, name);
      assert.equal(isSigned(payload, Buffer.concat([footer, space]), assertion, signature, key), false, name);
      assert.equal(isSigned(payload, footer, Buffer.concat([assertion, space]), signature, key), false, name);
    }
  });

  check('every shared vector has its verdict', () => {
    const { keys, cases } = vectors('licenses.json');
    for (const { name, token, plugin, instance, release_date: releaseDate, now, not_before_time: notBeforeTime, ...said } of cases) {
      const options = { keyring: keys, pluginId: plugin, instanceId: instance, releaseDate, now, notBeforeTime };
      assert.deepEqual(verdict(token, options), [said.expect, said.days_left], name);
    }
    assert.deepEqual([...new Set(cases.map(({ expect }) => expect))].sort(), [
      'bad_signature', 'clock_not_set', 'expired', 'grace', 'malformed', 'missing', 'not_yet_valid', 'unknown_key', 'unsupported',
      'update_not_covered', 'valid', 'warning', 'wrong_instance', 'wrong_plugin',
    ]);
  });

  check('JSON that parsers may read differently is malformed', () => {
    const usual = JSON.stringify(claims);
    const deep = (levels) => '['.repeat(levels) + ']'.repeat(levels);
    const table = {
      valid: [
        '"x":1.5,"y":-0,"z":1e300', '"x":null,"y":[true,{"a":{}}]', `"x":${deep(126)}`, '"constructor":1,"__proto__":{"exp":"x"}',
        String.raw`"x":"[[\\\"{","y":"\ud83d\ude00"`, '"lim2":{},"sub2":null',
      ],
      malformed: [
        `"x":${deep(127)}`, `"x":${deep(2500)}`, `"x":${'['.repeat(5000)}`, '"x":1,"x":1', String.raw`"x":1,"\u0078":1`,
        '"x":[{"y":1,"y":2}]', '"aud":"fixture"', '"x":NaN', '"x":-Infinity', '"x":1e999', `"x":${'9'.repeat(400)}`,
        `"x":${'9'.repeat(5000)}`, '"x":01', '"x":"\t"', String.raw`"x":"\ud800"`, String.raw`"\udfff":1`, '"x":1,', `"x":'1'`,
        '"grace_days":1.0', '"grace_days":-0', '"grace_days":1e1', '"grace_days":true', `"grace_days":${2 ** 53}`, '"exp":null',
        '"exp":"2026-02-30T00:00:00Z"', '"exp":"2027-01-01T24:00:00Z"', '"exp":"2027-01-01T00:00:60Z"',
        '"exp":"2027-01-01T00:00:00.0Z"', '"exp":"2027-01-01T00:00:00.000Z"', '"exp":"2027-01-01"', '"exp":"0000-01-01T00:00:00Z"',
        '"exp":"+010000-01-01T00:00:00Z"', String.raw`"exp":"2027-01-01T00:00:00Z\n"`, '"upd":["2027-01-01"]', '"upd":"2027-1-1"',
        '"crit":"exp"', '"nbf":0',
      ],
      unsupported: ['"crit":["__proto__"]', '"crit":["toString"]'],
    };
    for (const [expected, additions] of Object.entries(table)) {
      for (const more of additions) {
        const token = sign(Buffer.from(`${usual.slice(0, -1)},${more}}`));
        assert.equal(verdict(token)[0], expected, more.slice(0, 40));
      }
    }
    for (const payload of ['', '[]', 'null', `\ufeff${usual}`, usual + usual, usual.replace('"v":1', '"v":1.0')]) {
      assert.equal(verdict(sign(Buffer.from(payload)))[0], 'malformed', payload.slice(0, 40));
    }
    assert.equal(verdict(sign(Buffer.concat([Buffer.from(usual), Buffer.of(0xff)])))[0], 'malformed');
    const footers = [
      '', '{}', '{"kid":1}', '{"kid":"k-1","x":[]}', '{"kid":"k-1","kid":"k-1"}', '{"kid":"k 1"}', '{"kid":"k-1\\n"}', '["k-1"]',
      '['.repeat(250), `{"kid":"k-1","x":"${'x'.repeat(250)}"}`,
    ];
    for (const footer of footers) assert.equal(verdict(sign({}, footer))[0], 'malformed', footer.slice(0, 40));
  });

  check('a mutated token is refused and never breaks anything', () => {
    let state = 4; // a linear congruential generator, so that every run is the same
    const below = (limit) => Math.floor(((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32) * limit);
    const any = (list) => list[below(list.length)];
    const token = sign({ exp: '2027-01-01T00:00:00Z', x: [1.5, { y: null }] });
    const pieces = [
      ...'AZaz09-_=+/.{}[]:,"\\ \n\0', 'é', '\ud800', 'v4.public.', '['.repeat(200), '1e999', 'NaN', '"v":1,', token,
    ];
    const mutated = (text) => {
      for (let times = any([1, 1, 1, 2, 8]); times > 0; times--) {
        const at = below(text.length + 1);
        text = text.slice(0, at) + any(['', ...pieces]) + text.slice(at + any([0, 0, 1, 1, 1, 5, text.length]));
      }
      return text;
    };
    const payload = splitToken(token).payload.toString();
    const codes = new Set();
    for (let round = 0; round < 3000; round++) {
      const text = mutated(token);
      if (text.trim() !== token) assert.ok(!['valid', 'warning', 'grace'].includes(verdict(text)[0]), text);
      // Behind the signature as well, which the vendor's mistakes pass.
      codes.add(verdict(sign(Buffer.from(mutated(payload))))[0]);
    }
    assert.ok(codes.has('valid') && codes.has('malformed'), [...codes].join());
  });

  check("a keyring, a date or a time that is none is the author's error", () => {
    const metadata = { id: 'a', name: 'A', version: '1', icon: 'a', route: '/a' };
    const rings = [
      { 'k-1': publicKey.slice(0, -1) }, { 'k-1': `${publicKey}A` }, { 'k-1': `${publicKey}=` }, { 'k-1': null }, { '': publicKey },
      { 'k-1': publicKey.replace('public', 'secret') }, { 'k 1': publicKey }, { ['k'.repeat(65)]: publicKey },
      { ...keyring, 'k-2': 'k4.public.' },
    ];
    for (const licenseKeys of rings) assert.throws(() => new Plugin({ ...metadata, licenseKeys }), /plugrack license keygen/);
    for (const releaseDate of ['2026-02-30', '2026-3-1', 'today', '2026-03-01T00:00:00Z']) {
      assert.throws(() => new Plugin({ ...metadata, licenseKeys: {}, releaseDate }), /release date/);
    }
    assert.throws(() => verdict(null, { notBeforeTime: '2026-03-01' }), TypeError);
    assert.throws(() => verdict(null, { now: 'never' }), TypeError);
  });

  const licensed = (dir) => {
    const options = `licenseKeys: ${JSON.stringify(keyring)}, releaseDate: '2026-03-01', `;
    const shown = "context.granted.customer, [...context.granted.features], context.granted.limits.get('users')";
    const text = FIXTURE.replace('new Plugin({ ', `new Plugin({ ${options}`).replace('JSON.stringify(context)', shown);
    writeFileSync(join(dir, 'plugin.mjs'), text);
  };

  check('a plugin with a licence runs and knows what is granted', async (t) => {
    const plugin = start(t, { install: licensed });
    const { reply } = await plugin.init({ show: true }, { license: `${sign({})}\n`, not_before_time: '2026-06-01T00:00:00Z' });
    assert.deepEqual(reply.head, { type: 'ready', id: 0 });
    await plugin.logged('\n');
    assert.equal(plugin.log, "Customer [ 'export' ] 25\n");
  });

  check('a plugin without one says why in one line and exits', async (t) => {
    const far = '9000-01-01T00:00:00Z';
    for (const [code, exit, fields] of [
      ['missing', 78, {}],
      ['missing', 78, { license: ' \n' }],
      ['wrong_instance', 78, { license: sign({ inst: ['another'] }) }],
      ['update_not_covered', 78, { license: sign({ upd: '2026-02-28' }) }],
      ['expired', 78, { license: sign({ exp: far }), not_before_time: far }],
      ['clock_not_set', 75, { license: sign({ iat: far }) }],
    ]) {
      const plugin = start(t, { install: licensed });
      const { reply: { head } } = await plugin.init({}, fields);
      assert.deepEqual([head.type, head.code], ['error', code]);
      assert.match(head.message, new RegExp(`^licence: ${code}: .+$`));
      assert.equal(await plugin.exit, exit, code);
      assert.equal(plugin.log, `${head.message}\n`);
    }
  });

  check("the page's plugin works when copied", async (t) => {
    const page = readFileSync(join(ROOT, 'docs/licensing.md'), 'utf8');
    const text = page.split('```js\n')[1].split('```')[0].replace('k4.public.…', publicKey);
    const plugin = start(t, { install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), text) });
    const { wire } = await plugin.init({}, { license: sign({ aud: 'report', feat: [] }, '{"kid":"acme-2026a"}') });
    assert.equal(await wire.text('/'), 'Licensed to Customer, for 25 users.\n');
    assert.equal((await wire.get('/export')).status, 403);
  });
});

// The clock ------------------------------------------------------------------------------------------------------------

describe('the clock example', () => {
  const clock = {
    command: ['./plugin'],
    install: (dir) => cpSync(join(ROOT, 'plugins-examples/clock'), dir, { recursive: true, verbatimSymlinks: true }),
  };
  const ISO = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;

  check('describes itself', async (t) => {
    const plugin = start(t, { ...clock, args: ['--metadata'] });
    assert.equal(await plugin.exit, 0);
    const { id, name, icon, route, concurrency } = JSON.parse(plugin.out);
    assert.deepEqual({ id, name, icon, route, concurrency }, { id: 'clock', name: 'Clock', icon: '🕰️', route: '/clock', concurrency: 64 });
  });

  check('serves a page, a line of text, and refuses the rest', async (t) => {
    const wire = await start(t, clock).ready();
    const browser = { headers: [['accept', 'text/html,*/*;q=0.8']], mount: '/clock' };
    const type = ({ headers }) => headers.find(([name]) => name === 'content-type')[1];
    const page = await wire.get('/', browser);
    assert.equal(type(page), 'text/html; charset=utf-8');
    assert.match(page.body.toString(), /new EventSource\('\/clock\/events'\)/);
    const text = await wire.get('/', { headers: [['accept', '*/*']] });
    assert.equal(type(text), 'text/plain; charset=utf-8');
    assert.match(text.body.toString().trimEnd(), ISO);
    const head = await wire.get('/', { ...browser, method: 'HEAD' });
    assert.deepEqual([head.status, type(head), head.body.length], [200, 'text/html; charset=utf-8', 0]);
    assert.equal(type(await wire.get('/events', { method: 'HEAD' })), 'text/event-stream; charset=utf-8');
    assert.equal((await wire.get('/nowhere')).status, 404);
    const post = await wire.get('/', { method: 'POST' });
    assert.equal(post.status, 405);
    assert.ok(post.headers.some(([name, value]) => name === 'allow' && value === 'GET, HEAD'));
  });

  check('events come one at a time, until the client goes', async (t) => {
    const plugin = start(t, clock);
    const wire = await plugin.ready();
    wire.send(http(1, '/events'));
    const { head } = await wire.receive();
    assert.ok(head.headers.some(([name, value]) => name === 'cache-control' && value === 'no-store'));
    const times = [];
    while (times.length < 3) {
      const [, event, data] = (await wire.receive()).body.toString().match(/^event: (.*)\ndata: (.*)\n\n$/);
      assert.equal(event, 'tick');
      assert.match(data, ISO);
      times.push(Date.parse(data));
    }
    for (const gap of [times[1] - times[0], times[2] - times[1]]) {
      assert.ok(gap > 500 && gap < 2500, `${gap} ms between two events`);
    }
    const second = await plugin.connect();
    wire.close();
    assert.equal(await second.call({ type: 'shutdown', id: 2 }), null);
    assert.equal(await plugin.exit, 0);
    assert.equal(plugin.log, '');
  });
});

// Listeners as of node:http --------------------------------------------------------------------------------------------

const LISTENER = `
import { existsSync } from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { Plugin, fromNode } from './plugrack.mjs';

const plugin = new Plugin({ id: 'fixture', name: 'Fixture', version: '1.0.0', icon: '🧪', route: '/fixture', concurrency: 8 });
const go = async () => { while (!existsSync('go')) await setTimeout(5); };
let written = 0;

const paths = {
  '/look': (req, res) => {
    const { method, url, httpVersion, headers, rawHeaders, socket: { remoteAddress, remoteFamily, encrypted } } = req;
    res.setHeader('x-two', ['a', 'b']);
    res.end(JSON.stringify({ method, url, httpVersion, headers, raw: rawHeaders.length, remoteAddress, remoteFamily, encrypted }));
  },
  '/echo': async (req, res) => {
    const pieces = [];
    for await (const piece of req) pieces.push(piece);
    res.end(Buffer.concat(pieces));
  },
  '/pipe': (req, res) => req.pipe(res),
  '/slow-reader': async (req, res) => {
    let size = 0;
    for await (const piece of req) { await go(); size += piece.length; }
    res.end(String(size));
  },
  '/pieces': async (req, res) => {
    res.write('one');
    await setTimeout(20);
    res.write('two');
    await setTimeout(20);
    res.end('three');
  },
  '/gated': async (req, res) => {
    res.write('begun');
    await go();
    res.end('over');
  },
  '/large': (req, res) => res.end(Buffer.alloc(${3 * MIB}, 'big')),
  '/flood': async (req, res) => {
    res.on('close', () => console.log('flood closed', res.writableFinished));
    res.flushHeaders();
    while (!res.destroyed) {
      written += 65536;
      if (res.write(Buffer.alloc(65536))) await setTimeout(0);
      else await new Promise((done) => res.once('drain', done).once('close', done));
    }
  },
  '/written': (req, res) => res.end(String(written)),
  '/events': (req, res) => {
    req.on('aborted', () => console.log('aborted'));
    req.on('close', () => console.log('req closed'));
    res.on('close', () => console.log('res closed', res.writableFinished));
    res.on('finish', () => console.log('finished'));
    if (req.method === 'POST') res.end('done');
    else console.log('waiting');
  },
  '/early': (req, res) => res.writeHead(413).end('enough'),
  '/empty': (req, res) => res.writeHead(204).end(),
  '/unframed': (req, res) => { res.removeHeader('transfer-encoding'); res.write('no '); res.end('length'); },
  '/trailers': (req, res) => {
    res.writeHead(200, { trailer: 'x-sum' });
    res.write('body');
    res.addTrailers({ 'x-sum': '4' });
    res.end();
  },
  '/hints': (req, res) => { res.writeEarlyHints({ link: '</a.css>; rel=preload' }); res.end('hinted'); },
  '/throws': () => { throw new Error('thrown'); },
  '/rejects': async (req, res) => { res.setHeader('x-left', '1'); await setTimeout(5); throw new Error('rejected'); },
  '/breaks': async (req, res) => { res.write('begun'); await setTimeout(20); throw new Error('broken'); },
  '/destroys': (req, res) => res.destroy(),
  '/short': (req, res) => { res.writeHead(200, { 'content-length': 10 }); res.end('short'); },
};

const listener = fromNode((req, res) => paths[req.url.split('?')[0]](req, res));
plugin.onHttp((request) => (request.path === '/native' ? 'native' : listener(request)));
plugin.run();
`;

const EXPRESS = `
import express from 'express';
import { Plugin, fromNode } from './plugrack.mjs';

const app = express();
app.use(express.json());
app.get('/', (req, res) => res.send(\`\${req.ip} \${req.protocol} \${req.hostname} \${req.get('x-forwarded-prefix')}\`));
app.get('/items/:id', (req, res) => res.json({ id: req.params.id, full: req.query.full }));
app.post('/sum', (req, res) => res.json({ sum: req.body.reduce((a, b) => a + b) }));
app.get('/cookie', (req, res) => res.cookie('a', 'b').redirect('/fixture/'));
app.get('/stream', async (req, res) => {
  res.type('text/event-stream');
  for (let i = 0; i < 3; i++) { res.write(\`data: \${i}\\n\\n\`); await new Promise((done) => setTimeout(done, 10)); }
  res.end();
});
app.get('/file', (req, res) => res.sendFile(process.cwd() + '/plugin.mjs'));
app.get('/fails', async () => { throw new Error('in a route'); });

const plugin = new Plugin({ id: 'fixture', name: 'Fixture', version: '1.0.0', icon: '🧪', route: '/fixture' });
plugin.onHttp(fromNode(app));
plugin.run();
`;

describe('listeners of node:http', () => {
  const check = (name, body) => test(name, { timeout: 60_000 }, body); // Express takes its time where a machine is busy
  const installListener = (dir) => writeFileSync(join(dir, 'plugin.mjs'), LISTENER);
  const begin = async (t) => {
    const plugin = start(t, { install: installListener });
    return { plugin, wire: await plugin.ready() };
  };
  const printed = async (plugin, text) => {
    while (!plugin.out.includes(text)) await once(plugin.child.stdout, 'data');
  };
  const go = (plugin) => writeFileSync(join(plugin.dir, 'go'), '');
  const header = ({ headers }, name) => headers.filter(([each]) => each.toLowerCase() === name).map(([, value]) => value);

  check('the request is one of node:http', async (t) => {
    const { wire } = await begin(t);
    const headers = [['host', 'example.org'], ['x-forwarded-proto', 'https'], ['accept', 'a'], ['accept', 'b'], ['x-latin', 'é']];
    const answer = await wire.get('/look?b=%20c', { method: 'DELETE', headers });
    assert.deepEqual(JSON.parse(answer.body), {
      method: 'DELETE', url: '/look?b=%20c', httpVersion: '1.1', raw: 12, remoteAddress: '192.0.2.7', remoteFamily: 'IPv4', encrypted: true,
      headers: { host: 'example.org', 'x-forwarded-proto': 'https', accept: 'a, b', 'x-latin': 'é', connection: 'close' },
    });
    assert.deepEqual(header(answer, 'x-two'), ['a', 'b']);
    assert.deepEqual(header(answer, 'connection'), []);
    const head = ['x', 'y'].map((name) => [`x-${name}`, 'z'.repeat(20_000)]);
    assert.equal((await wire.get('/look', { headers: head })).status, 200, 'a head as large as a host may allow');
    assert.equal(await wire.text('/native'), 'native');
  });

  check('bodies come whole and in pieces, with a length and without', async (t) => {
    const { wire } = await begin(t);
    for (const path of ['/echo', '/pipe']) {
      for (const headers of [[], [['content-length', '60000']]]) {
        assert.equal((await wire.get(path, { method: 'POST', headers }, Buffer.alloc(60_000, 'x'))).body.length, 60_000, path);
      }
    }
    for (const headers of [[], [['content-length', String(MIB + 20)]]]) {
      wire.send(http(1, '/echo', { method: 'POST', headers, more: true }), '0123456789');
      wire.send({ type: 'data', id: 1, more: true }, Buffer.alloc(MIB, 'x'));
      wire.send({ type: 'data', id: 1 }, '9876543210');
      assert.equal((await wire.answer()).body.toString(), `0123456789${'x'.repeat(MIB)}9876543210`);
    }
    assert.equal(await wire.text('/echo', { method: 'POST' }), '');
  });

  check('a body that is not read holds up the host', async (t) => {
    const { plugin, wire } = await begin(t);
    wire.send(http(1, '/slow-reader', { method: 'POST', more: true }), 'x');
    let sent = 1;
    while (wire.send({ type: 'data', id: 1, more: true }, Buffer.alloc(65536)) || await Promise.race([
      once(wire.socket, 'drain').then(() => true), delay(500),
    ])) sent += 65536;
    sent += 65536;
    assert.ok(sent < 16 * MIB, `${sent}`);
    go(plugin);
    wire.send({ type: 'data', id: 1 });
    assert.equal((await wire.answer()).body.toString(), String(sent));
  });

  check('answers come in as many frames as they need', async (t) => {
    const { plugin, wire } = await begin(t);
    const frames = async (path, fields) => (await wire.get(path, fields)).frames.map(String);
    assert.deepEqual(await frames('/early'), ['enough']);
    assert.deepEqual(await frames('/pieces'), ['', 'one', 'two', 'three', '']);
    assert.deepEqual(await frames('/empty'), ['']);
    assert.equal(await wire.text('/unframed'), 'no length');
    assert.equal(await wire.text('/trailers'), 'body');
    assert.equal(await wire.text('/hints'), 'hinted');
    const large = await wire.get('/large');
    assert.deepEqual([large.body.length, header(large, 'content-length')], [3 * MIB, [String(3 * MIB)]]);
    wire.send(http(1, '/gated'));
    await wire.receive();
    assert.equal((await wire.receive()).body.toString(), 'begun');
    go(plugin);
    assert.equal((await wire.receive()).body.toString(), 'over');
    assert.equal((await wire.receive()).head.more, false);
    assert.equal(plugin.log, '');
  });

  check('HEAD has the head alone, also of an endless answer', async (t) => {
    const { plugin, wire } = await begin(t);
    const look = await wire.get('/large', { method: 'HEAD' });
    assert.deepEqual([look.status, look.frames.length, look.body.length], [200, 1, 0]);
    assert.equal((await wire.get('/flood', { method: 'HEAD' })).body.length, 0);
    assert.equal(await wire.text('/early'), 'enough');
    await printed(plugin, 'flood closed false');
  });

  check('a slow client holds up the listener, and one that goes closes it', async (t) => {
    const { plugin, wire } = await begin(t);
    wire.send(http(1, '/flood'));
    const other = await plugin.connect();
    for (let before = -1, now = 0; now !== before;) {
      await delay(300);
      [before, now] = [now, Number(await other.text('/written'))];
      assert.ok(now < 16 * MIB, `${now}`);
    }
    wire.close();
    await printed(plugin, 'flood closed false');
    other.send(http(1, '/events'));
    await printed(plugin, 'waiting');
    other.close();
    await printed(plugin, 'req closed');
    await printed(plugin, 'res closed false');
    assert.ok(plugin.out.includes('aborted'));
    assert.equal(await (await plugin.connect()).text('/native'), 'native');
  });

  check('a listener hears of the end of its answer', async (t) => {
    const { plugin, wire } = await begin(t);
    assert.equal(await wire.text('/events', { method: 'POST' }), 'done');
    await printed(plugin, 'res closed true');
    await printed(plugin, 'req closed');
    assert.ok(plugin.out.includes('finished') && !plugin.out.includes('aborted'), plugin.out);
  });

  check('an early answer drops the rest of the body, and reading on cuts the answer', async (t) => {
    const { plugin, wire } = await begin(t);
    wire.send(http(1, '/early', { method: 'POST', more: true }), 'x');
    assert.equal((await wire.receive()).body.toString(), 'enough');
    wire.send({ type: 'data', id: 1, more: true }, 'y');
    wire.send({ type: 'data', id: 1, aborted: true });
    assert.equal(await wire.text('/native'), 'native');
    assert.equal(plugin.log, '');
    wire.send(http(1, '/pipe', { method: 'POST', more: true }), 'x');
    assert.equal((await wire.receive()).head.type, 'response');
    wire.send({ type: 'data', id: 1, aborted: true });
    let last;
    while ((last = (await wire.receive()).head).type === 'data');
    assert.equal(last.type, 'error');
    assert.equal(await wire.text('/native'), 'native');
  });

  check('a failure is answered once', async (t) => {
    const { plugin, wire } = await begin(t);
    for (const [path, said] of [['/throws', 'Error: thrown'], ['/rejects', 'Error: rejected'], ['/destroys', 'without an answer']]) {
      const answer = await wire.get(path);
      assert.deepEqual([answer.status, answer.body.toString(), header(answer, 'x-left')], [500, 'internal error\n', []], path);
      await plugin.logged(said);
    }
    for (const path of ['/breaks', '/short']) {
      wire.send(http(1, path));
      assert.equal((await wire.receive()).head.status, 200);
      await wire.receive();
      assert.equal((await wire.receive()).head.type, 'error', path);
    }
    await plugin.logged('Error: broken');
    assert.equal((await wire.get('/look', { method: 'STRANGE' })).status, 400, 'as node:http does');
    assert.equal(await wire.text('/native'), 'native');
  });

  check('a shutdown waits for what is under way', async (t) => {
    const { plugin, wire } = await begin(t);
    wire.send(http(1, '/gated'));
    await wire.receive();
    await wire.receive();
    wire.send({ type: 'shutdown', id: 2 });
    await delay(100);
    go(plugin);
    assert.equal((await wire.receive()).body.toString(), 'over');
    assert.equal(await plugin.exit, 0);
    assert.equal(plugin.log, '');
  });

  check('what is no function is refused', () => assert.throws(() => fromNode({}), TypeError));

  check('an application of Express', async (t) => {
    const install = (dir) => {
      writeFileSync(join(dir, 'plugin.mjs'), EXPRESS);
      symlinkSync(join(PACKAGES, 'node/node_modules'), join(dir, 'node_modules'));
    };
    const plugin = start(t, { install });
    const wire = await plugin.ready();
    const headers = [['host', 'example.org'], ['x-forwarded-proto', 'https'], ['x-forwarded-prefix', '/fixture']];
    assert.equal(await wire.text('/', { headers }), '192.0.2.7 https example.org /fixture');
    assert.deepEqual(JSON.parse(await wire.text('/items/a%20b?full=1')), { id: 'a b', full: '1' });
    const json = [['content-type', 'application/json']];
    wire.send(http(1, '/sum', { method: 'POST', headers: json, more: true }), '[1,2');
    wire.send({ type: 'data', id: 1 }, ',3]');
    assert.equal((await wire.answer()).body.toString(), '{"sum":6}');
    assert.equal((await wire.get('/sum', { method: 'POST', headers: json }, '[')).status, 400);
    const redirect = await wire.get('/cookie');
    assert.deepEqual([redirect.status, header(redirect, 'location'), header(redirect, 'set-cookie')], [302, ['/fixture/'], ['a=b; Path=/']]);
    assert.deepEqual((await wire.get('/stream')).frames.map(String), ['', 'data: 0\n\n', 'data: 1\n\n', 'data: 2\n\n', '']);
    assert.equal(await wire.text('/file'), EXPRESS);
    assert.equal(await wire.text('/file', { headers: [['range', 'bytes=1-6']] }), 'import');
    assert.equal((await wire.get('/', { method: 'HEAD' })).status, 200);
    assert.equal((await wire.get('/nowhere')).status, 404);
    assert.equal((await wire.get('/fails')).status, 500);
    await plugin.logged('Error: in a route');
  });
});
