// A host made of raw frames that shares no code with the SDK, and real plugin processes: what the tests of the Node SDK have in common.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const SDK = join(ROOT, 'sdk/node/plugrack.mjs');
export const GOLDEN = JSON.parse(readFileSync(join(ROOT, 'tests/protocol/frames.json'), 'utf8'));
export const MIB = 1048576;
export const INSTANCE = '5f0c3f0e-3d3b-4c0a-9a43-3d5d1f1f7a10';

/** A test that fails rather than hangs. */
export const check = (name, body) => test(name, { timeout: 30_000 }, body);

export function frame(head, body = '') {
  const headBytes = Buffer.from(typeof head === 'string' ? head : JSON.stringify(head));
  const bodyBytes = Buffer.from(body);
  const lengths = Buffer.alloc(8);
  lengths.writeUInt32BE(headBytes.length, 0);
  lengths.writeUInt32BE(bodyBytes.length, 4);
  return Buffer.concat([lengths, headBytes, bodyBytes]);
}

/** A frame with another id in the place of 7, where its head can be told. */
export function withId(bytes, id) {
  const [head, body] = [bytes.readUInt32BE(0), bytes.readUInt32BE(4)];
  if (bytes.length !== 8 + head + body) return bytes;
  const text = bytes.toString('latin1', 8, 8 + head).replace('"id":7', `"id":${id}`);
  const lengths = Buffer.alloc(8);
  lengths.writeUInt32BE(text.length, 0);
  lengths.writeUInt32BE(body, 4);
  return Buffer.concat([lengths, Buffer.from(text, 'latin1'), bytes.subarray(8 + head)]);
}

export const http = (id, path, fields = {}) => {
  const [bare, query] = path.split('?');
  const defaults = { method: 'GET', path: bare, query, mount: '/fixture', headers: [], remote: '192.0.2.7', more: false };
  return { type: 'http', id, ...defaults, ...fields };
};

/** One end of a connection, in frames. */
export class Wire {
  #buffer = Buffer.alloc(0);
  #wake = null;

  constructor(socket) {
    this.socket = socket;
    socket.on('error', () => {}); // the end of it is what counts
    for (const event of ['readable', 'end', 'close']) socket.on(event, () => this.#wake?.());
  }

  send(head, body) {
    return this.socket.write(frame(head, body));
  }

  /** The next frame, or null at the end. Reads no more than it needs, so that a stream can be left unread. */
  async receive() {
    const lengths = await this.#bytes(8);
    if (!lengths) return null;
    const head = await this.#bytes(lengths.readUInt32BE(0));
    const body = await this.#bytes(lengths.readUInt32BE(4));
    return body && { head: JSON.parse(head.toString()), body };
  }

  async #bytes(count) {
    const parts = [this.#buffer];
    let size = this.#buffer.length;
    while (size < count) {
      const chunk = this.socket.read();
      if (chunk) {
        parts.push(chunk);
        size += chunk.length;
      } else if (this.socket.readableEnded || this.socket.destroyed) return null;
      else await new Promise((wake) => (this.#wake = wake));
    }
    const all = Buffer.concat(parts);
    this.#buffer = all.subarray(count);
    return all.subarray(0, count);
  }

  async call(head, body) {
    this.send(head, body);
    return this.receive();
  }

  /** Collects the whole answer to request 1. */
  async answer() {
    const { head, body: first } = await this.receive();
    assert.deepEqual([head.type, head.id], ['response', 1]);
    const frames = [first];
    for (let more = head.more; more; ) {
      const next = await this.receive();
      assert.deepEqual([next.head.type, next.head.id], ['data', 1]);
      frames.push(next.body);
      more = next.head.more;
    }
    return { status: head.status, headers: head.headers, frames, body: Buffer.concat(frames) };
  }

  get(path, fields, body) {
    this.send(http(1, path, fields), body);
    return this.answer();
  }

  async text(path, fields, body) {
    return (await this.get(path, fields, body)).body.toString();
  }

  close() {
    this.socket.destroy();
  }
}

const running = new Set();
process.on('exit', () => running.forEach((child) => child.kill('SIGKILL')));

/** A plugin's process in a directory of its own. */
export class Process {
  dir = mkdtempSync(join(tmpdir(), 'pr-'));
  log = '';
  #wires = [];

  /** Runs `command` with `args` in the directory that `install` has filled, beside the SDK. */
  constructor({ args = [], env = {}, install, command = [process.execPath, 'plugin.mjs'] }) {
    this.socketPath = join(this.dir, 'p.sock');
    this.hostPath = join(this.dir, 'h.sock');
    copyFileSync(SDK, join(this.dir, 'plugrack.mjs'));
    install(this.dir);
    const sockets = { PLUGRACK_SOCKET: this.socketPath, PLUGRACK_HOST_SOCKET: this.hostPath };
    this.child = spawn(command[0], [...command.slice(1), ...args], {
      cwd: this.dir,
      env: { PATH: process.env.PATH, HOME: this.dir, ...sockets, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    running.add(this.child);
    this.out = '';
    this.child.stdout.on('data', (chunk) => (this.out += chunk));
    this.child.stderr.on('data', (chunk) => (this.log += chunk));
    this.exit = once(this.child, 'close').then(([code, signal]) => signal ?? code);
  }

  /** Connects, trying until the plugin listens. */
  async connect() {
    for (;;) {
      const socket = connect(this.socketPath);
      try {
        await once(socket, 'connect');
        const wire = new Wire(socket);
        this.#wires.push(wire);
        return wire;
      } catch (error) {
        if (this.child.exitCode !== null) throw new Error(`the plugin has exited: ${this.log}`, { cause: error });
        await delay(5);
      }
    }
  }

  /** The first connection, with `init` sent; resolves to it and the reply. */
  async init(config = {}, fields = {}) {
    const wire = await this.connect();
    const reply = await wire.call({
      type: 'init', id: 0, protocol: 1, instance_id: INSTANCE, plugin_id: 'fixture',
      socket_path: this.socketPath, host_socket: this.hostPath, log_path: '/dev/null', data_dir: this.dir,
      license: null, config, host: { name: 'fake', version: '0' }, ...fields,
    });
    return { wire, reply };
  }

  /** Starts the plugin up to `ready`; resolves to its first connection. */
  async ready(config) {
    const { wire, reply } = await this.init(config);
    assert.deepEqual(reply.head, { type: 'ready', id: 0 });
    return wire;
  }

  /** Resolves once the plugin has written this to stderr. */
  async logged(text) {
    while (!this.log.includes(text)) await once(this.child.stderr, 'data');
  }

  async stop() {
    this.#wires.forEach((wire) => wire.close());
    this.child.kill('SIGKILL');
    await this.exit;
    running.delete(this.child);
    rmSync(this.dir, { recursive: true });
  }
}

/** Starts a process that ends with the test. */
export function startPlugin(t, options) {
  const plugin = new Process(options);
  t.after(() => plugin.stop());
  return plugin;
}
