// WebSocket in the Node SDK against docs/protocol.md: real plugin processes, and a host made of raw frames.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe } from 'node:test';
import { GOLDEN, MIB, check, http, startPlugin } from './fake_host.mjs';

const CREDIT = 65536; // of each side at first, unless ws_open or ws_accept says otherwise
const COST = 64; // of a message, beside its length

// What is under test runs this. What a socket is to do is its path; `say` writes to the log what the tests wait for.
const FIXTURE = (concurrency) => `
import { HttpError, Plugin, Reply } from './plugrack.mjs';
import { setImmediate, setTimeout } from 'node:timers/promises';

const plugin = new Plugin({ id: 'fixture', name: 'Fixture', version: '1.0.0', icon: '🧪', route: '/fixture',
  origins: ['https://app.example.org'], concurrency: ${concurrency} });
const say = (...words) => console.error(...words);
const seen = [];
const sockets = {};
let release;
const held = new Promise((resolve) => (release = resolve));
process.on('SIGUSR2', () => release());

const openings = {
  '/refused': () => new Reply('members only\\n', { status: 403, headers: { 'x-why': 'no member' } }),
  '/error': () => { throw new HttpError(429, 'later'); },
  '/bug': async () => { throw new Error('a bug in open'); },
  '/status': () => new Reply('fine', { status: 200 }),
  '/stream': () => new Reply(['a'].values(), { status: 403 }),
  '/header': () => new Reply('no', { status: 403, headers: { 'x-bad': 'a\\r\\nb' } }),
  '/large': () => new Reply(Buffer.alloc(${MIB} + 1), { status: 403 }),
  '/odd': () => 403,
  '/protocol': (s) => {
    try { s.protocol = 'chat.v3'; } catch (error) { say(error.name + ': ' + error.message); }
    say('chosen', s.protocol);
    s.protocol = s.protocols.at(-1);
  },
  '/greets': async (s) => {
    await s.send('one');
    await s.send(new Uint8Array([2]));
    await setImmediate();
    say('open', s.isOpen, plugin.sockets.length, plugin.broadcast('not to this one'));
  },
  '/history': async (s) => {
    for (let i = 0; i < 5; i++) await s.send(String(i).repeat(30000));
    if (s.query) return new Reply('no', { status: 403 });
  },
  '/leaves': (s) => { s.send('no'); s.close(4001, 'not today'); },
  '/held-open': async () => (say('deciding'), await held, undefined),
  '/held-refusal': async () => (say('deciding'), await held, new Reply('no', { status: 403 })),
};

const handlers = {
  echo: (s, _, text) => s.send(text),
  back: (s, message) => s.send(message),
  slowly: async (s, message, n) => (await setTimeout(20 - n * 10), s.send(message)),
  hold: async (s, message, n) => (say('holding ' + n), await held, say('held ' + n)),
  running: async (s, message, n) => { say('begin ' + n); await setTimeout(30); say('end ' + n); },
  large: async (s) => {
    for (const message of ['x'.repeat(${MIB} + 1), 5, null]) {
      try { await s.send(message); } catch (error) { say(error.name + ': ' + error.message); }
    }
    try { plugin.broadcast(Buffer.alloc(${MIB} + 1)); } catch (error) { say(error.name + ': ' + error.message); }
  },
  // Two sends that nobody awaits and one that is awaited; it is said when each has been sent.
  three: async (s, _, text) => {
    const size = Number(text);
    s.send('a'.repeat(size)).then(() => say('sent a'));
    s.send('b'.repeat(size)).then(() => say('sent b'), () => say('not sent b'));
    await s.send('c').then(() => say('sent c'));
  },
  unawaited: (s) => { for (let i = 0; i < 80; i++) s.send(Buffer.alloc(65536, i)).catch((error) => i === 65 && say(error.code)); },
  reuse: (s) => { const bytes = Buffer.alloc(70000, 'a'); s.send('x'.repeat(70000)); s.send(bytes); bytes.fill('b'); },
  surrogate: (s) => { s.send('\\ud83d!'); s.close(4000, '\\ud83d'); },
  waits: async (s) => {
    s.send('x'.repeat(70000));
    try { await s.send('y'); } catch (error) { say(error.name, error.code, error.message, s.isOpen); throw error; }
  },
  close: (s, _, text) => { s.close(...JSON.parse(text)); say('closed', s.isOpen, plugin.sockets.length); s.close(); s.send('late'); },
  'bad-close': (s) => {
    for (const args of [[1004], [1005], [1006], [1015], [2999], [5000], ['x'], [1000, 'r'.repeat(124)]]) {
      try { s.close(...args); } catch (error) { say(error.name); }
    }
  },
  throws: () => { throw new Error('a bug in a message'); },
  rejects: async () => { throw new TypeError('a bug later'); },
  'open-ones': () => say('open:', plugin.sockets.map((each) => each.path).join(' ')),
  tell: (s, _, text) => say('told', plugin.broadcast(text)),
  'tell-rooms': (s, _, text) => say('told', plugin.broadcast(text, plugin.sockets.filter((each) => each.path === '/room'))),
  'tell-gone': () => say('told', plugin.broadcast('x', Object.values(sockets))),
  request: (s) => s.send(JSON.stringify({ path: s.path, query: s.query, name: s.params.get('name'), mount: s.mount, remote: s.remote,
    host: s.headers.get('Host'), protocols: s.protocols, protocol: s.protocol, headers: [...s.headers] })),
  late: (s) => { try { s.protocol = null; } catch (error) { say(error.message); } },
};

let n = 0;
plugin.onHttp(async (request) => {
  const number = ++n;
  say('http begin ' + number);
  await setTimeout(30);
  say('http end ' + number);
  return 'answer';
});
plugin.onWebSocket((socket, message) => {
  const [name, ...rest] = String(message).split(' ');
  return (handlers[name] ?? (() => say('got', typeof message, message.length)))(socket, message, rest.join(' '));
});
plugin.onWebSocketOpen((socket) => {
  sockets[socket.path] = socket;
  return openings[socket.path]?.(socket);
});
plugin.onWebSocketClose(async (socket, code, reason) => {
  say('close ' + socket.path + ' ' + code + ' "' + reason + '" ' + socket.isOpen + ' ' + plugin.sockets.includes(socket));
  if (socket.path === '/close-throws') throw new Error('a bug in close');
  if (socket.path === '/close-sends') await socket.send('after the end');
});
plugin.run();
`;

const install = (source) => ({ install: (dir) => writeFileSync(join(dir, 'plugin.mjs'), source) });
const start = (t, concurrency = 8) => startPlugin(t, install(FIXTURE(concurrency)));

const wsOpen = (id, path = '/', fields = {}) => ({ type: 'ws_open', id, path, mount: '/fixture', ...fields });
const wsText = (id) => ({ type: 'ws_message', id, text: true });
const received = async (wire) => {
  const frame = await wire.receive();
  return frame && [frame.head, frame.body.toString()];
};

/** How often the plugin has logged something. */
const count = (plugin, text) => plugin.log.split(text).length - 1;
const loggedTimes = async (plugin, text, times) => {
  while (count(plugin, text) < times) await once(plugin.child.stderr, 'data');
};

/** A plugin that is ready, and the connection for its sockets. */
async function withSockets(t, concurrency) {
  const plugin = start(t, concurrency);
  const first = await plugin.ready();
  return { plugin, first, wire: await plugin.connect() };
}

/** Opens a socket that is accepted. */
async function accepted(wire, id, path, fields) {
  assert.deepEqual(await received(await (wire.send(wsOpen(id, path, fields)), wire)), [{ type: 'ws_accept', id }, '']);
}

/** Sends a text, and expects these answers before the credit for it. */
async function exchange(wire, id, text, ...answers) {
  wire.send(wsText(id), text);
  for (const answer of answers) assert.deepEqual(await received(wire), [wsText(id), answer]);
  assert.deepEqual(await received(wire), [{ type: 'ws_credit', id, bytes: Buffer.byteLength(text) + COST }, '']);
}

describe('WebSockets', () => {
  check('are in the metadata where there is a handler', async (t) => {
    const metadata = async (calls, fields = '') => {
      const source = `import { Plugin } from './plugrack.mjs';
        const plugin = new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p', ${fields} });
        ${calls}; plugin.run();`;
      const plugin = startPlugin(t, { args: ['--metadata'], ...install(source) });
      assert.equal(await plugin.exit, 0);
      const { speaks, origins } = JSON.parse(plugin.out);
      return [speaks, origins];
    };
    assert.deepEqual(await metadata(''), [undefined, undefined]);
    for (const name of ['onWebSocket', 'onWebSocketOpen', 'onWebSocketClose']) {
      assert.deepEqual(await metadata(`plugin.${name}(() => {})`), [['websocket'], undefined], name);
    }
    const both = 'plugin.onWebSocket(() => {}).onWebSocketClose(() => {})';
    assert.deepEqual(await metadata(both, "speaks: ['other'], origins: ['*']"), [['other', 'websocket'], ['*']]);
    assert.deepEqual(await metadata(both, "speaks: ['websocket']"), [['websocket'], undefined]);
  });

  check('the valid frames of the protocol are taken', async (t) => {
    const { plugin, wire } = await withSockets(t);
    const frames = GOLDEN.valid.filter(({ to }) => to === 'plugin_sockets');
    assert.ok(frames.length >= 10);
    for (const { name, hex, place, head } of frames) {
      const connection = await plugin.connect();
      if (place === 'open') await accepted(connection, head.id);
      connection.socket.write(Buffer.from(hex, 'hex'));
      if (head.type === 'ws_open') assert.deepEqual(await received(connection), [{ type: 'ws_accept', id: head.id }, ''], name);
      if (head.type === 'ws_message') assert.equal((await connection.receive()).head.type, 'ws_credit', name);
      if (head.type === 'ws_close') await loggedTimes(plugin, `close / ${head.code} "${head.reason ?? ''}" false false\n`, 1);
      else await exchange(connection, head.id, 'echo hello', 'hello');
      connection.close();
    }
    await accepted(wire, 1);
  });

  check('what is invalid closes their connection alone', async (t) => {
    const { plugin, first, wire } = await withSockets(t);
    await accepted(wire, 1, '/other');
    const frames = GOLDEN.invalid.filter(({ to }) => to === 'plugin_sockets' || to === 'any');
    assert.ok(frames.length > 20);
    for (const { name, hex, place } of frames) {
      const connection = await plugin.connect();
      await accepted(connection, place === 'start' ? 8 : 7);
      connection.socket.write(Buffer.from(hex, 'hex'));
      assert.equal(await connection.receive(), null, name);
    }
    const out = [
      [{ type: 'ws_open', id: 7, path: '/', mount: '' }, '', 'an id that is in use'],
      [{ type: 'ws_message', id: 8 }, 'x', 'a socket that is not there'],
      [{ type: 'ws_credit', id: 8, bytes: 1 }, '', 'credit for one that is not there'],
      [{ type: 'ws_message', id: 7, text: true }, Buffer.of(0xff), 'text that is not UTF-8'],
      [{ type: 'ws_close', id: 7, code: 5000 }, '', 'a code out of bounds'],
      [{ type: 'ws_close', id: 7, reason: 'x'.repeat(124) }, '', 'a reason that is too long'],
      [{ type: 'ws_accept', id: 7 }, '', 'an answer of a plugin'],
      [{ type: 'ping', id: 1 }, '', 'what belongs on another connection'],
      [http(1, '/'), '', 'a request'],
    ];
    for (const [head, body, name] of out) {
      const connection = await plugin.connect();
      await accepted(connection, 7);
      assert.equal(await connection.call(head, body), null, name);
    }
    const early = await plugin.connect();
    early.send(wsOpen(7, '/held-open'));
    assert.equal(await early.call({ type: 'ws_message', id: 7 }), null, 'a message before the acceptance');
    await plugin.logged('protocol error: a ws_message with id 7 came before the socket was accepted\n');
    await exchange(wire, 1, 'echo still here', 'still here');
    assert.equal(await first.text('/'), 'answer');
    await loggedTimes(plugin, 'close / 1006 "" false false\n', frames.length + out.length);
    assert.equal(count(plugin, 'protocol error: '), frames.length + out.length + 1);
  });

  check('before ready, on a connection for requests, and for a plugin without handlers they are out of place', async (t) => {
    const plugin = start(t);
    assert.equal(await (await plugin.connect()).call(wsOpen(1)), null);
    const first = await plugin.ready();
    assert.equal(await first.text('/'), 'answer');
    assert.equal(await first.call(wsOpen(1)), null);
    const source = `import { Plugin } from './plugrack.mjs';
      new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p' }).run();`;
    const deaf = startPlugin(t, install(source));
    await deaf.ready();
    assert.equal(await (await deaf.connect()).call(wsOpen(1)), null);
  });

  check('the conversation of the protocol', async (t) => {
    const source = `import { Plugin } from './plugrack.mjs';
      const plugin = new Plugin({ id: 'p', name: 'P', version: '1', icon: 'p', route: '/p' });
      plugin.onWebSocket((socket, message) => socket.send(message)).onWebSocketClose((_, code, reason) => console.error(code, reason));
      plugin.run();`;
    const plugin = startPlugin(t, install(source));
    await plugin.ready();
    const wire = await plugin.connect();
    const { steps } = GOLDEN.conversations.find(({ name }) => name === 'a socket');
    for (const { from, frame: name } of steps) {
      const { hex, head, body_hex: body } = GOLDEN.valid.find((each) => each.name === name);
      if (from === 'host') wire.socket.write(Buffer.from(hex, 'hex'));
      else assert.deepEqual(await received(wire), [head, Buffer.from(body, 'hex').toString()], name);
    }
    await plugin.logged('1000 bye ☕\n');
  });

  check('a socket has the request, and echoes text and bytes of any size', async (t) => {
    const { plugin, wire } = await withSockets(t);
    const headers = [['host', 'example.org'], ['sec-websocket-protocol', 'chat.v2, chat.v1'], ['sec-websocket-protocol', 'x']];
    await accepted(wire, 5, '/room', { query: 'name=%C3%A9', headers, remote: '203.0.113.9' });
    await exchange(wire, 5, 'request', JSON.stringify({
      path: '/room', query: 'name=%C3%A9', name: 'é', mount: '/fixture', remote: '203.0.113.9', host: 'example.org',
      protocols: ['chat.v2', 'chat.v1', 'x'], protocol: null, headers,
    }));
    await accepted(wire, 6);
    await exchange(wire, 6, 'request', JSON.stringify({
      path: '/', query: '', name: null, mount: '/fixture', remote: '', host: null, protocols: [], protocol: null, headers: [],
    }));
    await exchange(wire, 6, '');
    await plugin.logged('got string 0\n');
    wire.send({ type: 'ws_message', id: 6 });
    await plugin.logged('got object 0\n');
    assert.equal((await wire.receive()).head.bytes, COST);
    await exchange(wire, 6, 'echo ', '');
    for (const size of [16384, MIB]) {
      wire.send({ type: 'ws_credit', id: 6, bytes: 2 * MIB });
      const text = 'back ' + 'é'.repeat((size - 5) / 2 | 0);
      await exchange(wire, 6, text, text);
      const bytes = Buffer.alloc(size, 'back \xff\0', 'latin1');
      wire.send({ type: 'ws_message', id: 6 }, bytes);
      const echo = await wire.receive();
      assert.deepEqual(echo.head, { type: 'ws_message', id: 6 });
      assert.ok(echo.body.equals(bytes));
      assert.equal((await wire.receive()).head.bytes, size + COST);
    }
  });

  check('a message over 1 MiB is a RangeError, and what is none a TypeError', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    await exchange(wire, 1, 'large');
    await plugin.logged('bytes, over 1048576\nTypeError: expected a string or bytes, not 5\n');
    assert.equal(count(plugin, 'RangeError: a message of a WebSocket has 1048577 bytes, over 1048576\n'), 2);
    await exchange(wire, 1, 'echo on', 'on');
  });

  check('handlers of one socket run in order, those of several side by side', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    await accepted(wire, 2);
    for (const n of [0, 1, 2]) wire.send(wsText(1), `slowly ${n}`);
    const order = [];
    for (let i = 0; i < 6; i++) order.push((await received(wire)).map((part) => part.type ?? part).join(' ').trim());
    assert.deepEqual(order, [0, 1, 2].flatMap((n) => [`ws_message slowly ${n}`, 'ws_credit']));

    wire.send(wsText(1), 'hold 1');
    wire.send(wsText(1), 'hold 2');
    await plugin.logged('holding 1\n');
    await exchange(wire, 2, 'echo meanwhile', 'meanwhile');
    assert.equal(count(plugin, 'holding 2'), 0);
    wire.send({ type: 'ws_close', id: 1 });
    plugin.child.kill('SIGUSR2');
    await plugin.logged('close / undefined "" false false\n');
    assert.match(plugin.log, /holding 1\nheld 1\nholding 2\nheld 2\nclose/);
  });

  check('credit is returned when a handler has finished, and a message without credit breaks the protocol', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'hold 1');
    await plugin.logged('holding 1\n');
    // While any credit is left a message may take more than there is.
    wire.send({ type: 'ws_message', id: 1 }, Buffer.alloc(CREDIT - 2 * COST - 'hold 1'.length - 1));
    wire.send({ type: 'ws_message', id: 1 }, Buffer.alloc(MIB));
    plugin.child.kill('SIGUSR2');
    for (const size of [6, CREDIT - 2 * COST - 7, MIB]) {
      assert.deepEqual(await received(wire), [{ type: 'ws_credit', id: 1, bytes: size + COST }, '']);
    }
    await exchange(wire, 1, 'echo again', 'again');

    const other = await start(t);
    await other.ready();
    const greedy = await other.connect();
    await accepted(greedy, 1);
    greedy.send(wsText(1), 'hold 1');
    greedy.send({ type: 'ws_message', id: 1 }, Buffer.alloc(CREDIT));
    greedy.send({ type: 'ws_message', id: 1 });
    assert.equal(await greedy.receive(), null);
    await other.logged('protocol error: a ws_message with id 1 came without credit\n');
  });

  check('a send waits for credit, and sends keep their order', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), `three ${CREDIT - COST}`);
    assert.equal((await received(wire))[1][0], 'a');
    await plugin.logged('sent a\n');
    // The first has used up all: a byte more lets one more go, however long it is.
    await accepted(wire, 2);
    assert.equal(count(plugin, 'sent b'), 0);
    wire.send({ type: 'ws_credit', id: 1, bytes: 1 });
    assert.equal((await received(wire))[1][0], 'b');
    await plugin.logged('sent b\n');
    await exchange(wire, 2, 'echo another socket', 'another socket');
    assert.equal(count(plugin, 'sent c'), 0);
    wire.send({ type: 'ws_credit', id: 1, bytes: CREDIT - 1 });
    await exchange(wire, 2, 'echo still none', 'still none');
    wire.send({ type: 'ws_credit', id: 1, bytes: 1 });
    assert.deepEqual(await received(wire), [wsText(1), 'c']);
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await plugin.logged('sent c\n');
    assert.match(plugin.log, /sent a\nsent b\nsent c\n$/);

    await accepted(wire, 3, '/', { credit: 0 });
    wire.send(wsText(3), 'echo x');
    await exchange(wire, 2, 'echo y', 'y');
    wire.send({ type: 'ws_credit', id: 3, bytes: 1 });
    assert.deepEqual(await received(wire), [wsText(3), 'x']);
  });

  check('a message is sent as it was when send was called', async (t) => {
    const { wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'reuse');
    wire.send({ type: 'ws_credit', id: 1, bytes: MIB });
    const bodies = [];
    while (bodies.length < 2) {
      const { head, body } = await wire.receive();
      if (head.type === 'ws_message') bodies.push(body.toString());
    }
    assert.deepEqual(bodies, ['x'.repeat(70000), 'a'.repeat(70000)]);
  });

  check('sends that nobody awaits are bounded: one too many closes the socket with 1013', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'unawaited');
    assert.equal((await wire.receive()).body.length, 65536);
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 1, code: 1013, reason: 'the client reads too slowly' }, '']);
    await plugin.logged('backlog\n');
    assert.match(plugin.log, /closed a WebSocket with 1013: 4198400 bytes wait to be sent to its client, over 4194304: await each/);
    wire.send({ type: 'ws_close', id: 1, code: 1013 });
    await plugin.logged('close / 1013 "" false false\n');
    await accepted(wire, 2);
  });

  check('a host that does not read holds up the sends, within their credit', async (t) => {
    const { plugin, first, wire } = await withSockets(t);
    const three = async () => {
      wire.send(wsText(1), `three ${MIB}`);
      await plugin.logged('sent a\n');
      assert.equal(await first.text('/'), 'answer');
    };
    await accepted(wire, 1, '/', { credit: 64 * MIB });
    await accepted(wire, 2);
    await three();
    await plugin.logged('http end 1\n');
    assert.equal(count(plugin, 'sent b'), 0);
    for (const letter of 'abc') assert.equal((await received(wire))[1][0], letter);
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await plugin.logged('sent c\n');

    // A broadcast waits for nobody, and comes behind what waits.
    await three();
    wire.send(wsText(2), 'tell last');
    await plugin.logged('told 2\n');
    for (const letter of 'abc') assert.equal((await received(wire))[1][0], letter);
    for (const id of [1, 2]) assert.deepEqual(await received(wire), [wsText(id), 'last']);
  });

  check('broadcast sends to all or some, waits for nobody, and closes a socket that has no credit with 1013', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1, '/room');
    await accepted(wire, 2, '/room', { credit: 1 });
    await accepted(wire, 3, '/hall');
    wire.send(wsText(3), 'tell-rooms hello');
    assert.deepEqual(await received(wire), [wsText(1), 'hello']);
    assert.deepEqual(await received(wire), [wsText(2), 'hello']);
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await plugin.logged('told 2\n');
    wire.send(wsText(3), 'tell all');
    assert.deepEqual(await received(wire), [wsText(1), 'all']);
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 2, code: 1013, reason: 'the client reads too slowly' }, '']);
    assert.deepEqual(await received(wire), [wsText(3), 'all']);
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await exchange(wire, 3, 'open-ones');
    await plugin.logged('open: /room /hall\n');
    assert.equal(count(plugin, 'told 2\n'), 2);
    wire.send({ type: 'ws_close', id: 2, code: 1013 });
    await plugin.logged('close /room 1013 "" false false\n');

    // Its second message waits for credit already: that of the broadcast must not come before it.
    wire.send({ type: 'ws_close', id: 1 });
    await accepted(wire, 4, '/waiting');
    wire.send(wsText(4), `three ${CREDIT}`);
    assert.equal((await received(wire))[1][0], 'a');
    wire.send(wsText(3), 'tell you');
    assert.deepEqual(await received(wire), [wsText(3), 'you']);
    assert.equal((await wire.receive()).head.code, 1013);
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await exchange(wire, 3, 'tell-gone', 'x');
    await loggedTimes(plugin, 'told 1\n', 2);
    assert.doesNotMatch(plugin.log, /Error/, 'that send was rejected is no error of the handler');
  });

  check('an opening may refuse, also by an error', async (t) => {
    const { plugin, wire } = await withSockets(t);
    const refused = async (path) => {
      const { head, body } = await wire.call(wsOpen(1, path));
      wire.send({ type: 'ws_close', id: 1, code: 1006 }); // crosses the answer
      return [head.type, head.status, head.headers, body.toString()];
    };
    const text = ['content-type', 'text/plain; charset=utf-8'];
    assert.deepEqual(await refused('/refused'), ['response', 403, [['x-why', 'no member'], text], 'members only\n']);
    assert.deepEqual(await refused('/error'), ['response', 429, [text], 'later\n']);
    const failures = {
      '/bug': 'Error: a bug in open\n    at ',
      '/status': 'RangeError: a WebSocket is refused with a status of 300 to 599, not 200\n',
      '/stream': 'TypeError: a WebSocket is refused with a body that is whole, not a stream\n',
      '/header': 'TypeError: the header "x-bad" is not of the form that HTTP has\n',
      '/large': 'RangeError: a WebSocket is refused with 1048577 bytes, over 65536\n',
    };
    for (const [path, log] of Object.entries(failures)) {
      assert.deepEqual(await refused(path), ['response', 500, [text], 'internal error\n']);
      await plugin.logged(log);
    }
    await accepted(wire, 2, '/odd');
    await exchange(wire, 2, 'echo x', 'x');
    await exchange(wire, 2, 'open-ones');
    await plugin.logged('open: /odd\n');
    assert.equal(count(plugin, 'close '), 0);
  });

  check('an opening chooses one of the subprotocols that are offered', async (t) => {
    const { plugin, wire } = await withSockets(t);
    const headers = [['sec-websocket-protocol', 'chat.v2,chat.v1']];
    const { head } = await wire.call(wsOpen(1, '/protocol', { headers }));
    assert.deepEqual(head, { type: 'ws_accept', id: 1, protocol: 'chat.v1' });
    await plugin.logged('RangeError: the client does not offer the subprotocol "chat.v3"\nchosen null\n');
    await exchange(wire, 1, 'late');
    await plugin.logged('the subprotocol of a WebSocket is chosen before it is accepted, in onWebSocketOpen\n');
    assert.deepEqual((await wire.call(wsOpen(2, '/protocol'))).head, { type: 'ws_accept', id: 2 });
  });

  check('what an opening sends follows the acceptance', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1, '/greets');
    assert.deepEqual(await received(wire), [wsText(1), 'one']);
    assert.deepEqual(await received(wire), [{ type: 'ws_message', id: 1 }, '\x02']);
    await plugin.logged('open false 0 0\n');
    // Beyond the credit the sends themselves accept the socket: otherwise the handler would wait for itself.
    for (const query of [undefined, 'refuse']) {
      const id = query ? 2 : 3;
      await accepted(wire, id, '/history', { query });
      for (let i = 0; i < 5; i++) {
        assert.equal((await received(wire))[1], String(i).repeat(30000));
        wire.send({ type: 'ws_credit', id, bytes: 30000 + COST });
      }
      if (query) assert.deepEqual(await received(wire), [{ type: 'ws_close', id, code: 1011 }, '']);
      else await exchange(wire, id, 'echo x', 'x');
    }
    await plugin.logged('Error: a WebSocket cannot be refused after its close, or after a send beyond its credit\n');
    await accepted(wire, 4, '/leaves');
    assert.deepEqual(await received(wire), [wsText(4), 'no']);
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 4, code: 4001, reason: 'not today' }, '']);
  });

  check('a client that goes before the answer gets none', async (t) => {
    const { plugin, wire } = await withSockets(t);
    wire.send(wsOpen(1, '/held-open'));
    wire.send(wsOpen(2, '/held-refusal'));
    await loggedTimes(plugin, 'deciding\n', 2);
    for (const id of [1, 2]) wire.send({ type: 'ws_close', id, code: 1006 });
    await accepted(wire, 3);
    plugin.child.kill('SIGUSR2');
    // The one that its handler has let in has an end too, so that what was set up for it can be taken down.
    await plugin.logged('close /held-open 1006 "" false false\n');
    await exchange(wire, 3, 'open-ones');
    await plugin.logged('open: /\n');
    assert.equal(count(plugin, 'held-refusal'), 0);
  });

  check('closing: the plugin sends nothing more, and hears of the end once', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'close [4000,"é"]');
    // These cross the close.
    wire.send(wsText(1), 'dropped');
    wire.send({ type: 'ws_credit', id: 1, bytes: 5 });
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 1, code: 4000, reason: 'é' }, '']);
    wire.send(wsText(1), 'dropped');
    await plugin.logged('closed false 0\n');
    await accepted(wire, 2);
    assert.equal(count(plugin, 'close /'), 0);
    wire.send({ type: 'ws_close', id: 1, code: 4000 });
    await plugin.logged('close / 4000 "" false false\n');
    assert.equal(count(plugin, 'got string'), 0);

    wire.send(wsText(2), 'close []');
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 2, code: 1000 }, '']);
    // Both sides at once.
    await accepted(wire, 3);
    wire.send(wsText(3), 'echo handled');
    wire.send(wsText(3), 'close [3000]');
    wire.send({ type: 'ws_close', id: 3, code: 1001, reason: 'bye' });
    await plugin.logged('close / 1001 "bye" false false\n');
    assert.equal(count(plugin, 'close /'), 2);
    wire.send(wsOpen(4));
    const types = [];
    while (types.at(-1) !== 'ws_accept') types.push((await wire.receive()).head.type);
    assert.match(types.join(' '), /^(ws_message (ws_credit )?)?(ws_close )?ws_accept$/);
    await exchange(wire, 4, 'bad-close');
    await loggedTimes(plugin, 'RangeError\n', 8);
    wire.send(wsText(4), 'surrogate');
    assert.deepEqual(await received(wire), [wsText(4), '\ufffd!']);
    assert.deepEqual(await received(wire), [{ type: 'ws_close', id: 4, code: 4000, reason: '\ufffd' }, '']);
    assert.doesNotMatch(plugin.log, /at .*plugin\.mjs/);
  });

  check('a send that waits rejects when the client closes', async (t) => {
    const { plugin, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'waits');
    assert.equal((await wire.receive()).body.length, 70000);
    wire.send(wsText(1), 'got meanwhile');
    wire.send({ type: 'ws_close', id: 1, code: 1001 });
    await plugin.logged('close / 1001');
    // The messages that came before the end are handled before it.
    assert.match(plugin.log, /^SocketClosed closed the WebSocket is closed false\ngot string 13\nclose \/ 1001 "" false false\n$/);
  });

  check('an exception closes the socket with 1011, and its stack is in the log', async (t) => {
    const { plugin, wire } = await withSockets(t);
    for (const [id, text, log] of [[1, 'throws', 'Error: a bug in a message'], [2, 'rejects', 'TypeError: a bug later']]) {
      await accepted(wire, id);
      wire.send(wsText(id), text);
      assert.deepEqual(await received(wire), [{ type: 'ws_close', id, code: 1011 }, '']);
      await plugin.logged(`${log}\n    at `);
      wire.send({ type: 'ws_close', id, code: 1011 });
      await loggedTimes(plugin, 'close / 1011 "" false false\n', id);
    }
    await accepted(wire, 3, '/close-throws');
    wire.send({ type: 'ws_close', id: 3 });
    await plugin.logged('Error: a bug in close\n    at ');
    await accepted(wire, 4, '/close-sends');
    wire.send({ type: 'ws_close', id: 4 });
    await plugin.logged('close /close-sends');
    await accepted(wire, 5);
    await exchange(wire, 5, 'echo on', 'on');
    assert.equal(count(plugin, 'SocketClosed'), 0);
  });

  check('with a concurrency of 1 no two handlers run at once, whatever they handle', async (t) => {
    const { plugin, first, wire } = await withSockets(t, 1);
    await accepted(wire, 1);
    await accepted(wire, 2);
    wire.send(wsText(1), 'running 1');
    first.send(http(1, '/'));
    wire.send(wsText(2), 'running 2');
    wire.send(wsText(1), 'running 3');
    wire.send({ type: 'ws_close', id: 2, code: 1000 });
    assert.equal((await first.answer()).body.toString(), 'answer');
    await loggedTimes(plugin, 'end', 4);
    await plugin.logged('close / 1000');
    const lines = plugin.log.trimEnd().split('\n').filter((line) => !line.startsWith('close'));
    assert.equal(lines.length, 8);
    for (let i = 0; i < 8; i += 2) assert.equal(lines[i + 1], lines[i].replace('begin', 'end'));
    assert.ok(plugin.log.indexOf('end 2') < plugin.log.indexOf('close'));
  });

  check('with a concurrency of 1 the sockets take no place of requests', async (t) => {
    const { plugin, wire } = await withSockets(t, 1);
    await accepted(wire, 1);
    for (let i = 0; i < 4; i++) {
      assert.equal(await (await plugin.connect()).text('/'), 'answer');
      await exchange(wire, 1, 'echo x', 'x');
    }
    // Who goes before the turn of its opening is not asked for.
    wire.send(wsText(1), 'hold 1');
    await plugin.logged('holding 1\n');
    wire.send(wsOpen(2, '/held-open'));
    wire.send({ type: 'ws_close', id: 2 });
    plugin.child.kill('SIGUSR2');
    assert.equal((await wire.receive()).head.type, 'ws_credit');
    await exchange(wire, 1, 'echo x', 'x');
    assert.equal(count(plugin, 'deciding') + count(plugin, 'close'), 0);
  });

  check('shutdown ends the connection after the handlers under way, and a send that waits rejects', async (t) => {
    const { plugin, first, wire } = await withSockets(t);
    await accepted(wire, 1, '/waiting');
    wire.send(wsText(1), 'waits');
    assert.equal((await wire.receive()).body.length, 70000);
    await accepted(wire, 2, '/running');
    wire.send(wsText(2), 'running 1');
    wire.send(wsText(2), 'running 2');
    await plugin.logged('begin 1\n');
    await accepted(wire, 3, '/closed');
    wire.send({ type: 'ws_close', id: 3, code: 1012 });
    wire.send({ type: 'shutdown', id: 1 });
    assert.equal(await first.call({ type: 'shutdown', id: 1 }), null);
    assert.equal(await wire.receive(), null);
    assert.equal(await plugin.exit, 0);
    const lines = new Set(plugin.log.trimEnd().split('\n'));
    assert.deepEqual(lines, new Set([
      'begin 1', 'end 1', 'begin 2', 'end 2', 'SocketClosed closed the WebSocket is closed false',
      'close /waiting 1006 "" false false', 'close /running 1006 "" false false', 'close /closed 1012 "" false false',
    ]));
  });

  check('shutdown waits for a handler, also for one whose connection was lost', async (t) => {
    const { plugin, first, wire } = await withSockets(t);
    await accepted(wire, 1);
    wire.send(wsText(1), 'hold 1');
    await plugin.logged('holding 1\n');
    wire.send({ type: 'shutdown', id: 1 });
    let ended = false;
    const end = wire.receive().then((frame) => ((ended = true), frame));
    assert.equal(await first.text('/'), 'answer');
    assert.equal(ended, false);
    plugin.child.kill('SIGUSR2');
    assert.equal(await end, null);

    const lost = await plugin.connect();
    await accepted(lost, 1);
    lost.send(wsText(1), 'running 1');
    await plugin.logged('begin 1\n');
    lost.close();
    assert.equal(await first.call({ type: 'shutdown', id: 2 }), null);
    assert.equal(await plugin.exit, 0);
    assert.match(plugin.log, /end 1\nclose \/ 1006 "" false false\n$/);
  });

  check('the end of the connection is 1006 for each socket, and another connection goes on', async (t) => {
    const { plugin, first, wire } = await withSockets(t);
    const other = await plugin.connect();
    await accepted(other, 1, '/other');
    for (const id of [1, 2, 3]) await accepted(wire, id, `/${id}`);
    wire.send(wsText(1), 'hold 1');
    wire.send(wsText(2), 'waits');
    wire.send({ type: 'ws_close', id: 3, code: 1000 });
    assert.equal((await wire.receive()).body.length, 70000);
    await plugin.logged('holding 1\n');
    wire.close();
    await plugin.logged('close /2 1006 "" false false\n');
    assert.equal(count(plugin, 'close /1'), 0);
    await exchange(other, 1, 'open-ones');
    await plugin.logged('open: /other\n');
    plugin.child.kill('SIGUSR2');
    await plugin.logged('held 1\nclose /1 1006 "" false false\n');
    assert.equal(count(plugin, 'close /3'), 1);
    const again = await plugin.connect();
    await accepted(again, 1);
    await exchange(again, 1, 'echo x', 'x');
    for (const connection of [other, again, first]) assert.equal(await connection.call({ type: 'shutdown', id: 1 }), null);
    assert.equal(await plugin.exit, 0);
  });
});
