/**
 * The plugrack SDK for Node 18 and later: one file without dependencies, speaking version 1 of the plugin protocol.
 * Copy it beside the plugin and import it from there:
 *
 *     #!/usr/bin/env node
 *     import { Plugin } from './plugrack.mjs';
 *
 *     const plugin = new Plugin({ id: 'hello', name: 'Hello', version: '1.0.0', icon: '👋', route: '/hello' });
 *     plugin.onHttp(async (request) => `Hello, ${request.params.get('name') ?? 'world'}!\n`);
 *     plugin.run();
 *
 * `request.signal` is an AbortSignal that aborts once nobody waits for the answer any more. Pass it to what waits, so that a
 * silent stream ends as soon as its client has gone:
 *
 *     for await (const _ of setInterval(1000, null, { signal: request.signal })) yield 'data: tick\n\n';
 *
 * A request that the host has given up makes room for another, also while its handler still runs: at most twice `concurrency`
 * handlers run. With 1 the next handler is called once the one before has settled; only a stream that was given up may still run
 * beside it, until it heeds its signal.
 *
 * A listener as `http.createServer` takes it, such as an Express application, is the plugin's handler by `fromNode`:
 *
 *     plugin.onHttp(fromNode(app));
 *
 * A plugin with a handler for WebSocket messages gets those of its clients, whole and in order:
 *
 *     plugin.onWebSocket(async (socket, message) => socket.send(`You said: ${message}`));
 *
 * A proprietary plugin is given the public keys of its vendor, and its own release date. Its licence is then checked before
 * `onInit` runs, which finds in `context.granted` what the licence grants; where it does not hold, the plugin says what to do
 * and ends:
 *
 *     new Plugin({ id: 'report', …, licenseKeys: { 'acme-2026a': 'k4.public.…' }, releaseDate: '2026-11-02' });
 *
 * What a plugin prints goes to its log. Sizes are in bytes, times in milliseconds.
 */

import { createPublicKey, verify } from 'node:crypto';
import { createServer as createHttpServer } from 'node:http';
import { connect, createServer, isIP } from 'node:net';
import { Duplex } from 'node:stream';

const PROTOCOL = 1;
const PREFIX = 8; // the two lengths before each frame
const MAX_HEAD = 65536;
const MAX_BODY = 1048576;
const MAX_REFUSAL = 65536; // body of a response that refuses a WebSocket
const MAX_ERROR_MESSAGE = 4096;
const MAX_QUEUED = 1048576; // received and not yet handled, on one connection
const COPY_BELOW = 16384; // up to here copying a body beside its head is cheaper than a vectored write
const BODY_LIMIT = 1048576; // what reading a whole body takes unless told otherwise
const LIST_PAGE = 1000;
const SOCKET_CREDIT = 65536; // bytes of messages that each side of a WebSocket may send at first
const MESSAGE_COST = 64; // bytes of credit that a message takes beside its length, so that empty ones are bounded too
const MAX_BACKLOG = 4194304; // bytes that may wait on one WebSocket before its next send: four messages of the largest size
const MAX_CLOSE_REASON = 123; // bytes: what a close frame holds beside the code (RFC 6455, section 5.5)
const CONCURRENCY = 16; // requests at once unless told otherwise, so that a few streams leave room for others
const SHORTAGE_PAUSE = 100; // until the next try where files or memory have run out
const ABANDONED_PATIENCE = 500; // new connections wait this long for abandoned handlers before the log says so
const ABANDONED_TIME = 1000; // the exit waits this long for abandoned handlers: a third of the time the host gives a plugin to stop
const HEAD_TIME = 1000; // how long a listener may go on with a body that nobody gets, once a HEAD is answered
const SAY_EVERY = 60_000; // between two lines in the log about the same shortage
const SHORTAGES = new Set(['EMFILE', 'ENFILE', 'ENOMEM', 'ENOBUFS', 'ECONNABORTED', 'EPROTO', 'EAGAIN']);
const EXIT_FAILED = 1;
const EXIT_USAGE = 64;
const EXIT_TEMPORARY = 75;
const EXIT_REFUSED = 78;
const EMPTY = Buffer.alloc(0);
const CODE = /^[a-z][a-z0-9_]{0,63}$/;
const LONE_SURROGATE = /\p{Surrogate}/u;

/**
 * An error with a code. The host's refusals arrive as one; one thrown by an `onKv` handler reaches the operator.
 * Besides the host's codes the SDK uses `disconnected` (the host's socket is gone, and whether an outstanding write
 * was made is unknown), `too_large` (it does not fit a frame, and is not sent), `closed` and `backlog` (of a WebSocket's `send`)
 * and `protocol_error`.
 */
export class PluginError extends Error {
  name = 'PluginError';

  /**
   * @param {string} code for programs, of the form [a-z][a-z0-9_]{0,63}; another one reaches the operator as `internal`
   * @param {string} message one sentence, for people
   * @param {number} [index] in a transaction: the place of the write that failed
   */
  constructor(code, message, index) {
    super(message);
    this.code = code;
    this.index = index;
  }
}

/** Thrown by an `onInit` handler: the licence or the configuration is refused, and a restart would not help. */
export class Refuse extends PluginError {
  name = 'Refuse';
  exitCode = EXIT_REFUSED;

  /**
   * @param {string} message what the operator is shown
   * @param {string} [code]
   */
  constructor(message, code = 'refused') {
    super(code, message);
  }
}

/**
 * The licence does not let the plugin run. Its message is one line, `licence: CODE: WHAT TO DO`, with a code of
 * docs/licensing.md. After `clock_not_set` the process exits 75, so that the host tries again.
 */
export class LicenseError extends Refuse {
  name = 'LicenseError';

  /**
   * @param {string} code
   * @param {string} what what the operator is to do, one sentence
   */
  constructor(code, what) {
    super(`licence: ${code}: ${what}`, code);
    this.what = what;
    if (code === 'clock_not_set') this.exitCode = EXIT_TEMPORARY;
  }
}

/** Thrown by an `onHttp` or `onWebSocketOpen` handler: answers with this status and the message as plain text. */
export class HttpError extends Error {
  name = 'HttpError';

  /**
   * @param {number} status
   * @param {string} message what the client is shown
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What `send` of a WebSocket rejects with: the socket is closed, and the message was not sent. */
export class SocketClosed extends PluginError {
  name = 'SocketClosed';

  constructor() {
    super('closed', 'the WebSocket is closed');
  }
}

/** What the SDK throws where a connection or a body ended early; named as the platform names it. */
function abortError(message) {
  return Object.assign(new PluginError('aborted', message), { name: 'AbortError' });
}

// Frames ---------------------------------------------------------------------------------------------------------------

/**
 * Encodes one frame.
 *
 * @param {object} head
 * @param {Uint8Array} [body]
 * @returns {Uint8Array[]} the bytes to write, in order; a large body is itself the last part, not a copy
 * @throws {PluginError} `too_large`
 */
export function encodeFrame(head, body = EMPTY) {
  const text = JSON.stringify(head);
  const length = Buffer.byteLength(text);
  if (length > MAX_HEAD) throw new PluginError('too_large', `a frame's head has ${length} bytes, over ${MAX_HEAD}`);
  if (body.length > MAX_BODY) throw new PluginError('too_large', `a frame's body has ${body.length} bytes, over ${MAX_BODY}`);
  const copied = body.length <= COPY_BELOW;
  const frame = Buffer.allocUnsafe(PREFIX + length + (copied ? body.length : 0));
  frame.writeUInt32BE(length, 0);
  frame.writeUInt32BE(body.length, 4);
  frame.write(text, PREFIX);
  if (!copied) return [frame, body];
  frame.set(body, PREFIX + length);
  return [frame];
}

/** Writes the parts of a frame at once; returns whether the socket wants more. */
function writeParts(socket, parts) {
  socket.cork();
  let wanting = true;
  for (const part of parts) wanting = socket.write(part);
  socket.uncork();
  return wanting;
}

/** Cuts a stream of bytes into frames. */
export class FrameDecoder {
  #utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
  #chunks = [];
  #size = 0;
  #headLength = 0; // 0 between frames: no head is empty
  #bodyLength = 0;

  /**
   * Takes the next bytes and yields the frames they complete.
   *
   * @param {Buffer} chunk
   * @returns {Generator<{head: object, text: string, body: Buffer, size: number}>} `text` is the head before parsing
   * @throws {PluginError} `protocol_error`; nothing can be decoded after it
   */
  *push(chunk) {
    this.#chunks.push(chunk);
    this.#size += chunk.length;
    for (;;) {
      if (this.#headLength === 0) {
        if (this.#size < PREFIX) return;
        const prefix = this.#take(PREFIX);
        this.#headLength = prefix.readUInt32BE(0);
        this.#bodyLength = prefix.readUInt32BE(4);
        if (this.#headLength < 1 || this.#headLength > MAX_HEAD || this.#bodyLength > MAX_BODY) {
          throw new PluginError('protocol_error', 'a length is out of bounds');
        }
      }
      const size = this.#headLength + this.#bodyLength;
      if (this.#size < size) return;
      const { head, text } = this.#parse(this.#take(this.#headLength), this.#bodyLength);
      this.#headLength = 0;
      yield { head, text, body: this.#take(this.#bodyLength), size };
    }
  }

  #parse(bytes, bodyLength) {
    let text, head;
    try {
      text = this.#utf8.decode(bytes);
      head = JSON.parse(text);
    } catch {
      throw new PluginError('protocol_error', 'a head is not JSON in UTF-8');
    }
    if (typeof head?.type !== 'string' || !Number.isSafeInteger(head.id) || head.id < 0) {
      throw new PluginError('protocol_error', 'a head has no valid type and id');
    }
    // `null` is the same as no field.
    if (text.includes('null')) head = Object.fromEntries(Object.entries(head).filter(([, value]) => value !== null));
    const fault = faultOf(head, bodyLength);
    if (fault) throw new PluginError('protocol_error', fault);
    return { head, text };
  }

  /** Removes `length` bytes, which must be there; they are copied only where they span chunks. */
  #take(length) {
    this.#size -= length;
    const first = this.#chunks[0];
    if (length === 0) return EMPTY;
    if (length < first.length) {
      this.#chunks[0] = first.subarray(length);
      return first.subarray(0, length);
    }
    let count = 0;
    let end = 0;
    while (end < length) end += this.#chunks[count++].length;
    const taken = this.#chunks.splice(0, count);
    const rest = end - length;
    if (rest > 0) {
      const last = taken[count - 1];
      taken[count - 1] = last.subarray(0, last.length - rest);
      this.#chunks.unshift(last.subarray(last.length - rest));
    }
    return count === 1 ? taken[0] : Buffer.concat(taken, length);
  }
}

const TEXT = [(value) => typeof value === 'string', 'a string'];
const FLAG = [(value) => typeof value === 'boolean', 'true or false'];
const COUNT = [(value) => Number.isInteger(value) && value >= 0, 'an integer that is not negative'];
const CREDIT = [(value) => Number.isSafeInteger(value) && value >= 0, 'an integer from 0 to 9007199254740991'];
const PAIRS = [
  (value) => Array.isArray(value) && value.every((pair) => Array.isArray(pair) && pair.length === 2 && TEXT[0](pair[0]) && TEXT[0](pair[1])),
  'an array of [name, value] pairs',
];

/** The fields of the messages that a plugin is sent: those that must be there, and those that may be. */
const FIELDS = {
  init: [{ instance_id: TEXT, plugin_id: TEXT, config: [(value) => typeof value === 'object', 'an object'] }, { license: TEXT }],
  http: [{ method: TEXT, path: TEXT, mount: TEXT }, { query: TEXT, headers: PAIRS, remote: TEXT, more: FLAG }],
  data: [{}, { more: FLAG, aborted: FLAG }],
  kv: [{ op: TEXT }, {}],
  result: [{}, { found: FLAG, rev: COUNT, value: [Number.isInteger, 'an integer'], expires_in_ms: COUNT, next: TEXT }],
  error: [
    {
      code: [(value) => TEXT[0](value) && CODE.test(value), 'a string of the form [a-z][a-z0-9_]{0,63}'],
      message: [(value) => TEXT[0](value) && value && Buffer.byteLength(value) <= MAX_ERROR_MESSAGE, 'a string of 1 to 4096 bytes'],
    },
    { index: COUNT },
  ],
  ws_open: [{ path: TEXT, mount: TEXT }, { query: TEXT, headers: PAIRS, remote: TEXT, credit: CREDIT }],
  ws_message: [{}, { text: FLAG }],
  ws_credit: [{ bytes: CREDIT }, {}],
  ws_close: [
    {},
    {
      code: [(value) => Number.isInteger(value) && value >= 1000 && value <= 4999, 'an integer from 1000 to 4999'],
      reason: [(value) => TEXT[0](value) && Buffer.byteLength(value) <= MAX_CLOSE_REASON, 'a string of at most 123 bytes'],
    },
  ],
};
const WITH_BODY = new Set(['http', 'response', 'data', 'result', 'ws_message']);
const OPS_WITHOUT_BODY = new Set(['get', 'delete', 'incr', 'list']);

/** Says what is wrong with a message, if anything: a field that is not of its form, or a body beside a message that has none. */
function faultOf(head, bodyLength) {
  const { type } = head;
  const [required, optional] = FIELDS[type] ?? [{}, {}];
  for (const name in required) {
    const [holds, form] = required[name];
    if (head[name] === undefined) return `${type}.${name} is missing: it must be ${form}`;
    if (!holds(head[name])) return `${type}.${name} must be ${form}`;
  }
  for (const name in optional) {
    const [holds, form] = optional[name];
    if (head[name] !== undefined && !holds(head[name])) return `${type}.${name} must be ${form}`;
  }
  if (bodyLength === 0 || WITH_BODY.has(type)) return null;
  if (type !== 'kv') return `${type} must have no body, got ${bodyLength} bytes`;
  return OPS_WITHOUT_BODY.has(head.op) ? `kv ${head.op} must have no body, got ${bodyLength} bytes` : null;
}

/** Says what is wrong with the result of an operation, if anything. */
function resultFault(op, head, bodyLength) {
  const wanted = { get: 'found', delete: 'found', incr: 'value', set: 'rev' }[op];
  if (wanted && head[wanted] === undefined) return `result.${wanted} is missing`;
  const bodiless = op === 'set' || op === 'delete' || op === 'incr' || (op === 'get' && !head.found);
  if (bodiless && bodyLength > 0) return `this result of ${op} must have no body, got ${bodyLength} bytes`;
  return null;
}

/** A message as it is called in a sentence. */
function named({ type, id }) {
  const names = { data: 'data', http: 'an http request', kv: 'a kv request', init: 'an init message', error: 'an error' };
  return `${names[type] ?? `a ${type}`} with id ${id}`;
}

function toBytes(value) {
  if (typeof value === 'string') return Buffer.from(value);
  if (value instanceof Uint8Array) return value;
  throw new TypeError(`expected a string or bytes, not ${describe(value)}`);
}

function describe(value) {
  return Object(value) === value ? `an instance of ${value.constructor?.name}` : String(value);
}

// Requests and replies -------------------------------------------------------------------------------------------------

/** A request's body: what came in its own frame, and the `data` frames after it. */
class Body {
  #chunk;
  #more;
  #pull;
  #discarded = false;
  #turn = Promise.resolve(); // readers take turns, and a failure is the answer to all that follow

  /**
   * @param {{head: object, body: Buffer}} frame the request
   * @param {() => Promise<{head: object, body: Buffer}>} pull receives the next `data` frame
   */
  constructor(frame, pull) {
    this.#chunk = frame.body;
    this.#more = frame.head.more === true;
    this.#pull = pull;
  }

  /** Whether there are bytes to read, or may be. */
  get isExpected() {
    return this.#more || this.#chunk?.length > 0;
  }

  /** Resolves to the next bytes, or to null at the end. Rejects where the body is cut short. */
  async read() {
    if (this.#discarded) throw abortError('a body cannot be read after the answer has begun');
    const chunk = await this.#advance();
    if (this.#discarded) throw abortError('the answer has begun before the body was read');
    return chunk;
  }

  /** Drops what is left and resolves at its end. */
  async discard() {
    this.#discarded = true;
    try {
      while (this.#more) await this.#advance();
    } catch {
      // A body nobody wants may be cut short.
    }
  }

  #advance() {
    this.#turn = this.#turn.then(async () => {
      if (this.#chunk) {
        const chunk = this.#chunk;
        this.#chunk = null;
        return chunk;
      }
      if (!this.#more) return null;
      const { head, body } = await this.#pull();
      this.#more = head.more === true;
      if (head.aborted) throw abortError('the host ended the body early');
      return body;
    });
    return this.#turn;
  }
}

/** The headers of a request, in the order they came; iterating gives `[name, value]` pairs, names in lower case. */
class HeaderList {
  #pairs;

  constructor(pairs) {
    this.#pairs = pairs;
  }

  /**
   * @param {string} name in any case
   * @returns {string | null} the value; those of a repeated header are joined
   */
  get(name) {
    const values = this.getAll(name);
    // Every list in a header may be split over lines at its commas, except that of cookies.
    return values.length ? values.join(name.toLowerCase() === 'cookie' ? '; ' : ', ') : null;
  }

  /**
   * @param {string} name in any case
   * @returns {string[]} each value on its own
   */
  getAll(name) {
    const wanted = name.toLowerCase();
    return this.#pairs.filter(([each]) => each === wanted).map(([, value]) => value);
  }

  [Symbol.iterator]() {
    return this.#pairs[Symbol.iterator]();
  }
}

/**
 * An HTTP request. Its body is read once, as a whole or piece by piece (`for await (const chunk of request)`), and before the
 * handler returns: answering tells the host that no more of it is needed. Reading rejects with an `AbortError` where the body
 * is cut short.
 */
class HttpRequest {
  #body;
  #gone;
  #params;

  /** What a bridge needs besides: the body itself, and the AbortSignal that aborts only once the connection has ended. */
  static bridged(request) {
    return { body: request.#body, gone: request.#gone };
  }

  constructor(head, body, signal, gone) {
    /** Such as `GET`. */
    this.method = head.method;
    /** What follows the mount, not decoded; begins with `/`. */
    this.path = head.path;
    /** What follows the `?`, not decoded; empty where there is none. */
    this.query = head.query ?? '';
    /** The plugin's route: what links to the plugin's own pages begin with; empty for a request by host name. */
    this.mount = head.mount;
    this.headers = new HeaderList(head.headers ?? []);
    /** The client's address; empty when it is not known. */
    this.remote = head.remote ?? '';
    /**
     * An AbortSignal: the client has gone, the time for the answer has passed, or the plugin is to stop. While more than 1 MiB of
     * the body waits unread, the end of the connection is not noticed.
     */
    this.signal = signal;
    this.#body = body;
    this.#gone = gone;
  }

  /** The query, decoded: a URLSearchParams. */
  get params() {
    return (this.#params ??= new URLSearchParams(this.query));
  }

  async *[Symbol.asyncIterator]() {
    for (let chunk; (chunk = await this.#body.read()) !== null; ) {
      if (chunk.length > 0) yield chunk;
    }
  }

  /**
   * @param {{limit?: number}} [options] the largest body to take, 1 MiB unless given
   * @returns {Promise<Buffer>}
   * @throws {HttpError} 413 for a larger one
   */
  async body({ limit = BODY_LIMIT } = {}) {
    const chunks = [];
    let size = 0;
    for await (const chunk of this) {
      size += chunk.length;
      if (size > limit) throw new HttpError(413, `the body is over ${limit} bytes`);
      chunks.push(chunk);
    }
    return chunks.length === 1 ? chunks[0] : Buffer.concat(chunks, size);
  }

  /** The body as text in UTF-8; `options` as for `body`. */
  async text(options) {
    return (await this.body(options)).toString();
  }

  /**
   * The body parsed as JSON; `options` as for `body`.
   *
   * @throws {HttpError} 400 where it is not JSON
   */
  async json(options) {
    const text = await this.text(options);
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new HttpError(400, `the body is not JSON: ${error.message}`);
    }
  }
}

/** An answer with a status and headers. It may be kept and returned again, unless its body is a stream. */
export class Reply {
  /**
   * @param {string | Uint8Array | object | unknown[] | Iterable | AsyncIterable | null} body
   *   text, bytes, a plain object or array (sent as JSON), a stream of texts and bytes (each sent as it is produced),
   *   or null for none
   * @param {object} [init]
   * @param {number} [init.status] 200 unless given
   * @param {Record<string, string | string[]> | Iterable<[string, string]>} [init.headers]
   *   an array of values, or repeated pairs, for a header that repeats; `content-type` follows from the body unless given
   * @throws {TypeError} the body is nothing of this kind
   */
  constructor(body, { status = 200, headers = {} } = {}) {
    const [content, type] = contentOf(body);
    this.status = status;
    this.headers = headerPairs(headers);
    this.body = content;
    if (type && !hasHeader(this.headers, 'content-type')) this.headers.push(['content-type', type]);
  }
}

/** The bytes or the stream to send, and its media type. */
function contentOf(body) {
  if (body === null) return [EMPTY, null];
  if (typeof body === 'string') return [Buffer.from(body), 'text/plain; charset=utf-8'];
  if (body instanceof Uint8Array) return [body, 'application/octet-stream'];
  if (Array.isArray(body)) return [Buffer.from(JSON.stringify(body)), 'application/json'];
  if (body?.[Symbol.asyncIterator] || body?.[Symbol.iterator]) return [body, 'application/octet-stream'];
  if (isPlain(body)) return [Buffer.from(JSON.stringify(body)), 'application/json'];
  throw new TypeError(`a reply cannot be ${describe(body)}`);
}

/** Whether a value is meant as JSON: an instance of a class is rather a slip, such as a promise nobody awaited. */
function isPlain(value) {
  if (typeof value !== 'object') return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

function headerPairs(headers) {
  const entries = headers[Symbol.iterator] ? [...headers] : Object.entries(headers);
  return entries.flatMap(([name, value]) => [value].flat().map((each) => [name, String(each)]));
}

function hasHeader(pairs, name) {
  return pairs.some(([each]) => each.toLowerCase() === name);
}

/** What answers a request whose handler threw. */
function failure(error, signal) {
  if (error instanceof HttpError) return new Reply(`${error.message}\n`, { status: error.status });
  if (error?.name === 'AbortError' && signal.aborted) return new Reply('the plugin is stopping\n', { status: 503 });
  console.error(error);
  return new Reply('internal error\n', { status: 500 });
}

function errorFrame(id, error) {
  const code = error instanceof PluginError && CODE.test(error.code) ? error.code : 'internal';
  if (error instanceof PluginError && code !== error.code) {
    console.error(`plugrack: ${error.code} is no code of an error, and is sent as internal: a code is [a-z][a-z0-9_]{0,63}`);
  }
  // Cut to what the protocol allows, and sent through bytes since half a surrogate pair is not Unicode.
  const bytes = Buffer.from(String(error?.message ?? error));
  let end = Math.min(bytes.length, MAX_ERROR_MESSAGE);
  while (end > 0 && (bytes[end] & 0xc0) === 0x80) end--; // not inside a character
  return encodeFrame({ type: 'error', id, code, message: bytes.toString('utf8', 0, end) || code });
}

/** Lets go of a stream, read or not: a Node stream is destroyed, a web stream cancelled, a generator returned. */
function release(stream) {
  return stream.destroy?.() ?? stream.cancel?.() ?? stream.return?.();
}

// The connections from the host ----------------------------------------------------------------------------------------

/** Counts the connections that are served. One that the host has closed counts until its handler has ended too. */
class Capacity {
  #concurrency;
  #live = 0;
  #abandoned = 0;
  #turn = Promise.resolve(); // of the handler that was called last, where they are called one by one
  #timer = null;
  #complain = throttled('no connection is served until a handler ends');

  constructor(concurrency) {
    this.#concurrency = concurrency;
  }

  /** Calls a handler. With one connection its author may rely on it that no other runs, not even one whose request was given up. */
  inTurn(handler) {
    return this.#concurrency === 1 ? this.#afterTheLast(handler) : handler();
  }

  async #afterTheLast(handler) {
    const before = this.#turn;
    let settle;
    this.#turn = new Promise((resolve) => { settle = resolve; });
    await before;
    try {
      return await handler();
    } finally {
      settle();
    }
  }

  /** The connections that the host has closed while their handlers still run. */
  get abandoned() {
    return this.#abandoned;
  }

  get #isUsedUp() {
    return this.#live + this.#abandoned >= 2 * this.#concurrency && this.#live < this.#concurrency;
  }

  /** Whether a new connection has to wait for an abandoned handler. Says so in the log if that lasts. */
  mustWait() {
    if (this.#isUsedUp) this.#timer ??= setTimeout(() => this.#say(), ABANDONED_PATIENCE);
    return this.#isUsedUp;
  }

  #say() {
    this.#timer = null;
    if (!this.#isUsedUp) return;
    const message =
      `${this.#abandoned} handlers still run for requests that the host has given up, and at most ` +
      `${2 * this.#concurrency} handlers run at once; handlers that wait should heed request.signal`;
    this.#complain({ message });
  }

  enter() {
    this.#live++;
  }

  /** A connection has ended before its handler. */
  abandon() {
    this.#live--;
    this.#abandoned++;
  }

  leave(abandoned) {
    if (abandoned) this.#abandoned--;
    else this.#live--;
  }
}

/**
 * One connection from the host, served one request at a time.
 *
 * Frames are received while a request is handled, so that the end of the connection and a shutdown are noticed at once;
 * they wait in a queue, and the socket is paused while that is full.
 */
class Connection {
  #socket;
  #session;
  #decoder = new FrameDecoder();
  #queue = [];
  #queued = 0;
  #closed = false;
  #served = false; // counted by the session's capacity
  #abandoned = false; // counted there as one whose handler still runs
  #stopping = false;
  #controller = null; // of the request under way
  #gone = new AbortController(); // of the connection
  #arrived = null; // wakes who waits for a frame
  #drained = null; // wakes who waits for the socket to take more

  /**
   * @param {import('node:net').Socket} socket
   * @param {{handlers: object, license: (context: object) => License | null, connections: Set<Connection>, capacity: Capacity,
   *   speaks: string[], sockets: {open: Set<ClientSocket>, running: number}, initialized: boolean, ready: boolean,
   *   stopping: boolean}} session what the connections of a process share
   */
  constructor(socket, session) {
    this.#socket = socket;
    this.#session = session;
    session.connections.add(this);
    socket.on('data', (chunk) => this.#receive(chunk));
    socket.on('drain', () => this.#drained?.());
    socket.on('end', () => this.#close());
    socket.on('error', () => this.#close());
    socket.on('close', () => {
      this.#close();
      session.connections.delete(this);
      this.#exitIfStopped();
    });
    this.#serveWithinCapacity().catch((error) => {
      if (!this.#closed || error?.name !== 'AbortError') console.error(error);
      this.#close();
    });
  }

  async #serveWithinCapacity() {
    const { capacity, connections } = this.#session;
    while (!this.#closed && this.#queue.length === 0) await this.#change();
    // The connection for WebSockets is beside those for requests, and never waits for them.
    if (this.#queue[0]?.head.type === 'ws_open') return this.#serveSockets();
    while (!this.#closed && capacity.mustWait()) await this.#change();
    if (this.#closed) return;
    this.#served = true;
    capacity.enter();
    try {
      await this.#serve();
    } finally {
      this.#served = false;
      capacity.leave(this.#abandoned);
      for (const connection of connections) connection.#arrived?.();
      this.#exitIfStopped();
    }
  }

  #exitIfStopped() {
    const { stopping, connections, capacity, sockets } = this.#session;
    if (!stopping || connections.size > 0) return;
    if (capacity.abandoned + sockets.running === 0) process.exit(0);
    setTimeout(process.exit, ABANDONED_TIME, 0);
  }

  /** Resolves when a frame has come, the connection has ended, or another one has. */
  #change() {
    return new Promise((resolve) => (this.#arrived = resolve));
  }

  #receive(chunk) {
    try {
      for (const frame of this.#decoder.push(chunk)) {
        if (frame.head.type === 'shutdown') {
          // Its turn comes behind what is under way, which must hear of it now: a stream might never end otherwise.
          this.#stopping = true;
          this.#controller?.abort();
        }
        this.#queue.push(frame);
        this.#queued += frame.size;
      }
    } catch (error) {
      this.#reject(error.message);
    }
    if (this.#queued > MAX_QUEUED) this.#socket.pause();
    this.#arrived?.();
  }

  /** Resolves to the next frame, or to undefined at the end of the connection. */
  async #next() {
    while (this.#queue.length === 0 && !this.#closed) {
      await this.#change();
    }
    const frame = this.#queue.shift();
    this.#queued -= frame?.size ?? 0;
    if (this.#queued <= MAX_QUEUED && this.#socket.isPaused()) this.#socket.resume();
    return frame;
  }

  async #send(parts) {
    if (this.#closed) throw abortError('the connection has ended');
    if (!writeParts(this.#socket, parts)) {
      await new Promise((resolve) => (this.#drained = resolve));
    }
  }

  #close() {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#served) {
      this.#abandoned = true;
      this.#session.capacity.abandon();
    }
    this.#queue.length = 0;
    this.#socket.destroy();
    this.#controller?.abort();
    this.#gone.abort();
    this.#arrived?.();
    this.#drained?.();
  }

  /** Closes the connection for a protocol error. */
  #reject(reason) {
    console.error(`plugrack: protocol error: ${reason}`);
    this.#close();
  }

  async #serve() {
    for (let frame; (frame = await this.#next()); ) {
      const { type, id } = frame.head;
      const session = this.#session;
      if (type === 'init' ? session.initialized : !session.ready) return this.#reject(`${type} is out of place`);
      switch (type) {
        case 'init':
          await this.#init(frame.head);
          break;
        case 'http':
          await this.#http(frame);
          break;
        case 'kv':
          await this.#kv(frame);
          break;
        case 'ping':
          await this.#send(encodeFrame({ type: 'pong', id }));
          break;
        case 'shutdown':
          session.stopping = true;
          this.#socket.destroySoon(); // once the replies are written
          return;
        default:
          return this.#reject(`${type} is out of place`);
      }
    }
  }

  /** Serves the connection for WebSockets. Each socket has ended and its handlers have returned when this resolves. */
  async #serveSockets() {
    const session = this.#session;
    if (!session.ready || !session.speaks.includes('websocket')) return this.#reject('ws_open is out of place');
    const link = new SocketLink(this.#socket, session);
    try {
      for (let frame; (frame = await this.#next()); ) {
        if (frame.head.type === 'shutdown') {
          await link.finish();
          session.stopping = true;
          this.#socket.destroySoon(); // once what was sent is written
          return;
        }
        link.take(frame);
      }
    } catch (error) {
      if (error.code !== 'protocol_error') throw error;
      this.#reject(error.message);
    } finally {
      await link.finish();
      this.#exitIfStopped();
    }
  }

  async #init({ id, ...fields }) {
    this.#session.initialized = true;
    try {
      const context = {
        instanceId: fields.instance_id,
        pluginId: fields.plugin_id,
        socketPath: fields.socket_path,
        hostSocket: fields.host_socket,
        logPath: fields.log_path,
        dataDir: fields.data_dir,
        license: fields.license ?? null,
        config: fields.config,
        host: fields.host,
        notBeforeTime: fields.not_before_time ?? null,
      };
      await this.#session.handlers.init({ ...context, granted: this.#session.license(context) });
    } catch (error) {
      const refused = error instanceof Refuse;
      console.error(refused ? error.message : error);
      writeParts(this.#socket, errorFrame(id, error));
      this.#socket.end(() => process.exit(refused ? error.exitCode : EXIT_FAILED));
      return;
    }
    this.#session.ready = true;
    await this.#send(encodeFrame({ type: 'ready', id }));
  }

  async #kv({ head: { id, op, key }, body }) {
    let answer;
    try {
      const outcome = (await this.#session.capacity.inTurn(() => this.#session.handlers.kv({ op, key, value: op === 'set' ? body : undefined }))) ?? {};
      const { found = op === 'get' ? outcome.value != null : false, rev, value } = outcome;
      const fields = op === 'set' ? { rev } : { found, rev };
      answer = encodeFrame({ type: 'result', id, ...fields }, op === 'get' && found && value != null ? toBytes(value) : EMPTY);
    } catch (error) {
      if (!(error instanceof PluginError)) console.error(error);
      answer = errorFrame(id, error);
    }
    await this.#send(answer);
  }

  async #http(frame) {
    const body = new Body(frame, () => this.#data(frame.head.id));
    const { signal } = (this.#controller = new AbortController());
    if (this.#stopping) this.#controller.abort();
    let reply;
    try {
      const request = new HttpRequest(frame.head, body, signal, this.#gone.signal);
      const result = await this.#session.capacity.inTurn(() => this.#session.handlers.http(request));
      reply = result instanceof Reply ? result : new Reply(result);
    } catch (error) {
      reply = failure(error, signal);
    }
    // Not awaited before the answer is sent: it is the answer that tells the host to end the body.
    const dropped = body.discard();
    await this.#answer(frame.head, reply, dropped, signal);
    this.#controller = null;
  }

  async #answer({ id, method }, { status, headers, body }, dropped, signal) {
    const whole = body instanceof Uint8Array;
    const bodiless = method === 'HEAD';
    const first = whole && !bodiless ? body.subarray(0, MAX_BODY) : EMPTY;
    const more = !bodiless && (!whole || body.length > MAX_BODY);
    const untold = whole && body.length > first.length && !hasHeader(headers, 'content-length');
    const fields = untold ? [...headers, ['content-length', String(body.length)]] : headers;
    try {
      await this.#send(encodeFrame({ type: 'response', id, status, headers: fields, more }, first));
      await dropped;
      if (more) await this.#stream(id, whole ? [body.subarray(MAX_BODY)] : body, signal);
    } catch (error) {
      if (this.#closed) throw error;
      // The host cuts the answer short, and the connection serves the next request.
      console.error(error);
      await this.#send(errorFrame(id, error));
      await dropped;
    } finally {
      if (!whole) await release(body);
    }
  }

  async #stream(id, pieces, signal) {
    try {
      // Leaving this loop by an error returns the iterator: the `finally` of a generator runs when its client has gone.
      for await (const piece of pieces) {
        const bytes = toBytes(piece);
        for (let at = 0; at < bytes.length; at += MAX_BODY) {
          await this.#send(encodeFrame({ type: 'data', id, more: true }, bytes.subarray(at, at + MAX_BODY)));
        }
      }
    } catch (error) {
      // Heeding the signal of a plugin that is stopping is a proper end, though it comes as an error.
      if (this.#closed || !signal.aborted || error?.name !== 'AbortError') throw error;
    }
    await this.#send(encodeFrame({ type: 'data', id, more: false }));
  }

  /** Resolves to the `data` frame that continues the request's body. */
  async #data(id) {
    const frame = await this.#next();
    if (frame?.head.type === 'data' && frame.head.id === id) return frame;
    if (frame) this.#reject(`${named(frame.head)} came where data with id ${id} was due`);
    throw abortError('the connection ended in a body');
  }
}

// WebSockets -----------------------------------------------------------------------------------------------------------

const HEADER_NAME = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/;
const HEADER_VALUE = /^[\t\x20-\x7e\x80-\xff]*$/;
const tellOfBacklog = throttled('closed a WebSocket with 1013');

/** A message as it is sent. Its bytes are a copy, so that the caller may use its own again. */
function parcelOf(message) {
  const body = Buffer.from(toBytes(message));
  if (body.length > MAX_BODY) throw new RangeError(`a message of a WebSocket has ${body.length} bytes, over ${MAX_BODY}`);
  return { text: typeof message === 'string', body };
}

/** What a message takes of the credit. */
function costOf(body) {
  return body.length + MESSAGE_COST;
}

/** Whether a plugin may close a socket with this code (RFC 6455, section 7.4). */
function isCloseCode(code) {
  const within = (first, last) => code >= first && code <= last;
  return Number.isInteger(code) && (within(1000, 1003) || within(1007, 1014) || within(3000, 4999));
}

/** A WebSocket of a client, with the request that has opened it. */
class ClientSocket {
  #channel;
  #params;

  /** @param {ClientSocket} socket */
  static channelOf(socket) {
    return socket.#channel;
  }

  constructor(head, channel) {
    /** What follows the mount, not decoded; begins with `/`. */
    this.path = head.path;
    /** What follows the `?`, not decoded; empty where there is none. */
    this.query = head.query ?? '';
    /** The plugin's route; empty for a request by host name. */
    this.mount = head.mount;
    this.headers = new HeaderList(head.headers ?? []);
    /** The client's address; empty when it is not known. */
    this.remote = head.remote ?? '';
    /**
     * The subprotocols that the client offers, in its order of preference.
     *
     * @type {string[]}
     */
    this.protocols = (this.headers.get('sec-websocket-protocol') ?? '').split(',').map((each) => each.trim()).filter(Boolean);
    this.#channel = channel;
  }

  /** The query, decoded: a URLSearchParams. */
  get params() {
    return (this.#params ??= new URLSearchParams(this.query));
  }

  /**
   * The subprotocol that the plugin has chosen, or null. An `onWebSocketOpen` handler sets it to one of `protocols`.
   *
   * @returns {string | null}
   */
  get protocol() {
    return this.#channel.protocol;
  }

  set protocol(value) {
    if (value != null && !this.protocols.includes(value)) {
      throw new RangeError(`the client does not offer the subprotocol ${JSON.stringify(value)}`);
    }
    this.#channel.choose(value ?? null);
  }

  /** Whether the socket was accepted, and neither side has closed it. */
  get isOpen() {
    return this.#channel.isOpen;
  }

  /**
   * Sends a message: a string as text, bytes as binary. It waits for credit, which the host returns as the client reads. The
   * promise resolves when the message is sent to the host, and rejects with `SocketClosed` if the socket is closed before that.
   * A rejection that nobody awaits does not end the process.
   *
   * Messages are sent in the order of the calls, also where nobody awaits them. While 4 MiB or more wait on the socket, the next
   * `send` rejects with the code `backlog` and closes the socket with 1013, so that its client misses no message silently.
   *
   * @param {string | Uint8Array} message
   * @returns {Promise<void>}
   * @throws {RangeError} at once: it has more than 1 MiB
   * @throws {TypeError} at once: it is neither a string nor bytes
   */
  send(message) {
    return this.#channel.send(parcelOf(message));
  }

  /**
   * Closes the socket; does nothing where it is closed. What was sent before reaches the client first; a `send` that still waits
   * rejects. Messages that are not handled yet, or arrive afterwards, are dropped. The `onWebSocketClose` handler is called when
   * the client has answered.
   *
   * @param {number} [code] 1000 to 1003, 1007 to 1014, or 3000 to 4999 for the plugin's own
   * @param {string} [reason] for people, at most 123 bytes
   * @throws {RangeError} the code or the reason is out of bounds
   */
  close(code = 1000, reason = '') {
    if (!isCloseCode(code)) {
      throw new RangeError(`a WebSocket is closed with a code of 1000-1003, 1007-1014 or 3000-4999, not ${describe(code)}`);
    }
    const bytes = Buffer.from(reason);
    if (bytes.length > MAX_CLOSE_REASON) throw new RangeError(`the reason has ${bytes.length} bytes, over ${MAX_CLOSE_REASON}`);
    this.#channel.close(code, bytes.toString()); // through bytes, since half a surrogate pair is not Unicode
  }
}

/** A WebSocket as the SDK sees it: its state, its credit in both directions, and its handlers one after another. */
class Channel {
  #id;
  #link;
  #session;
  #protocol = null;
  #accepted = false;
  #closed = false; // nothing more is sent
  #refused = false;
  #left = false; // closed by the plugin, so what arrives is for nobody
  #end = null; // code and reason, once nothing more arrives
  #credit; // that the host has given
  #allowance = SOCKET_CREDIT; // credit that the host has
  #held = []; // frames for after the acceptance
  #waiting = []; // sends
  #backlog = 0; // what they cost
  #inbox = []; // messages to handle
  #arrived = null; // wakes who waits for a message or the end

  /**
   * @param {object} head of the `ws_open`
   * @param {SocketLink} link
   * @param {object} session
   */
  constructor(head, link, session) {
    this.#id = head.id;
    this.#credit = head.credit ?? SOCKET_CREDIT;
    this.#link = link;
    this.#session = session;
    this.socket = new ClientSocket(head, this);
  }

  get protocol() {
    return this.#protocol;
  }

  choose(protocol) {
    if (this.#accepted) throw new Error('the subprotocol of a WebSocket is chosen before it is accepted, in onWebSocketOpen');
    this.#protocol = protocol;
  }

  get isOpen() {
    return this.#accepted && !this.#closed;
  }

  // From the plugin.

  send(parcel) {
    if (this.#closed) return quietly(Promise.reject(new SocketClosed()));
    if (this.#backlog >= MAX_BACKLOG) {
      const message = `${this.#backlog} bytes wait to be sent to its client, over ${MAX_BACKLOG}: await each socket.send`;
      tellOfBacklog({ message });
      this.close(1013, 'the client reads too slowly');
      return quietly(Promise.reject(new PluginError('backlog', message)));
    }
    this.#backlog += costOf(parcel.body);
    const sent = new Promise((resolve, reject) => this.#waiting.push({ parcel, resolve, reject }));
    this.flush();
    return quietly(sent);
  }

  /** Sends a message now, or closes the socket; returns whether it was sent. */
  post(parcel) {
    if (this.#closed) return false;
    this.flush(true);
    if (this.#credit > 0) {
      this.#write(parcel);
      return true;
    }
    this.close(1013, 'the client reads too slowly');
    return false;
  }

  close(code, reason = '') {
    if (this.#closed) return;
    this.#accept();
    this.#link.write(encodeFrame({ type: 'ws_close', id: this.#id, code, reason: reason || undefined }));
    this.#left = true;
    this.#shut();
  }

  // From the host.

  /** Takes a message; returns what is wrong with it, if anything. */
  receive(message, cost) {
    if (!this.#accepted) return 'came before the socket was accepted';
    if (this.#allowance <= 0) return 'came without credit';
    this.#allowance -= cost;
    this.#inbox.push({ message, cost });
    this.#arrived?.();
    return null;
  }

  addCredit(bytes) {
    this.#credit += bytes;
    this.flush();
  }

  /** Nothing more arrives. The handlers of what has arrived run all the same. */
  end(code, reason) {
    this.#end ??= { code, reason };
    this.#shut();
    this.#arrived?.();
  }

  // Sending.

  /** Sends what waits, as far as the credit goes and, unless `all` of it is to go, the connection takes more. */
  flush(all = false) {
    while (this.#waiting.length > 0 && this.#credit > 0) {
      if (this.#accepted && !all && this.#link.isFull) {
        this.#link.block(this);
        return;
      }
      const { parcel, resolve } = this.#waiting.shift();
      this.#backlog -= costOf(parcel.body);
      this.#write(parcel);
      resolve();
    }
    // There is no more credit before the acceptance: a handler that awaits it would wait for itself.
    if (this.#waiting.length > 0) this.#accept();
  }

  #write({ text, body }) {
    this.#credit -= costOf(body);
    const parts = encodeFrame({ type: 'ws_message', id: this.#id, text: text || undefined }, body);
    if (this.#accepted) this.#link.write(parts);
    else this.#held.push(parts);
  }

  #accept() {
    if (this.#accepted || this.#closed) return;
    this.#accepted = true;
    this.#session.sockets.open.add(this.socket);
    this.#link.write(encodeFrame({ type: 'ws_accept', id: this.#id, protocol: this.#protocol ?? undefined }));
    for (const parts of this.#held.splice(0)) this.#link.write(parts);
  }

  #shut() {
    this.#closed = true;
    this.#session.sockets.open.delete(this.socket);
    this.#held.length = 0;
    for (const { reject } of this.#waiting.splice(0)) reject(new SocketClosed());
  }

  // The handlers.

  /** Calls the handlers in order, and resolves when the last one has settled. */
  async run() {
    const { sockets } = this.#session;
    sockets.running++;
    try {
      if (!(await this.#decide())) return;
      for (;;) {
        const next = this.#inbox.shift();
        if (next) await this.#handle(next);
        else if (this.#end) break;
        else await new Promise((resolve) => (this.#arrived = resolve));
      }
      await this.#call('socketClose', this.#end.code, this.#end.reason);
    } finally {
      sockets.running--;
    }
  }

  /** Accepts or refuses the socket. Resolves to whether the other handlers are to be called. */
  async #decide() {
    const { handlers, capacity } = this.#session;
    if (!handlers.socketOpen) {
      this.#accept();
      return true;
    }
    try {
      const result = await capacity.inTurn(() => {
        if (!this.#end) return handlers.socketOpen(this.socket);
        this.#refused = true; // the client has gone before the turn came
      });
      if (result instanceof Reply) this.#refuse(result);
    } catch (error) {
      this.#answerFailure(error);
    }
    this.#accept();
    return !this.#refused;
  }

  #refuse({ status, headers, body }) {
    if (this.#accepted) throw new Error('a WebSocket cannot be refused after its close, or after a send beyond its credit');
    if (!Number.isInteger(status) || status < 300 || status > 599) {
      throw new RangeError(`a WebSocket is refused with a status of 300 to 599, not ${status}`);
    }
    if (!(body instanceof Uint8Array)) throw new TypeError('a WebSocket is refused with a body that is whole, not a stream');
    if (body.length > MAX_REFUSAL) throw new RangeError(`a WebSocket is refused with ${body.length} bytes, over ${MAX_REFUSAL}`);
    const fault = headers.find(([name, value]) => !HEADER_NAME.test(name) || !HEADER_VALUE.test(value));
    if (fault) throw new TypeError(`the header ${JSON.stringify(fault[0])} is not of the form that HTTP has`);
    const parts = encodeFrame({ type: 'response', id: this.#id, status, headers }, body);
    if (!this.#closed) this.#link.write(parts);
    this.#refused = true;
    this.#shut();
  }

  /** Answers for an `onWebSocketOpen` handler that has thrown. */
  #answerFailure(error) {
    if (this.#accepted || (this.#closed && error instanceof SocketClosed)) {
      this.#fail(error);
      return;
    }
    try {
      this.#refuse(failure(error, { aborted: this.#closed }));
    } catch (fault) {
      this.#refuse(failure(fault, { aborted: this.#closed }));
    }
  }

  async #handle({ message, cost }) {
    await this.#call('socketMessage', message);
    if (this.#closed) return;
    this.#allowance += cost;
    this.#link.write(encodeFrame({ type: 'ws_credit', id: this.#id, bytes: cost }));
  }

  async #call(name, ...values) {
    const { handlers, capacity } = this.#session;
    try {
      await capacity.inTurn(() => {
        if (name === 'socketClose' || !this.#left) return handlers[name](this.socket, ...values);
      });
    } catch (error) {
      this.#fail(error);
    }
  }

  /** A handler has failed. That its client has gone meanwhile is no failure. */
  #fail(error) {
    if (this.#closed && error instanceof SocketClosed) return;
    console.error(error);
    this.close(1011);
  }
}

/** A promise whose rejection concerns only who awaits it. */
function quietly(promise) {
  promise.catch(() => {});
  return promise;
}

/** The connection for all WebSockets: it hands what the host sends to their channels, and takes what they send. */
class SocketLink {
  #stream;
  #session;
  #utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
  #channels = new Map(); // by id, up to the end of each
  #runs = new Set(); // of the channels whose handlers are not through
  #blocked = new Set(); // channels that wait for the stream to take more
  #corked = false;

  /**
   * @param {import('node:net').Socket} stream
   * @param {object} session
   */
  constructor(stream, session) {
    this.#stream = stream;
    this.#session = session;
    stream.on('drain', () => this.#unblock());
  }

  get isFull() {
    return this.#stream.writableNeedDrain;
  }

  /** Notes a channel that has credit, to be flushed when the stream takes more. */
  block(channel) {
    this.#blocked.add(channel);
  }

  #unblock() {
    for (const channel of [...this.#blocked]) {
      if (this.isFull) return;
      this.#blocked.delete(channel);
      channel.flush();
    }
  }

  /** Writes a frame. Those of one turn of the event loop go out together. */
  write(parts) {
    if (this.#stream.destroyed) return;
    if (!this.#corked) {
      this.#corked = true;
      this.#stream.cork();
      process.nextTick(() => {
        this.#corked = false;
        this.#stream.uncork();
      });
    }
    for (const part of parts) this.#stream.write(part);
  }

  /**
   * Takes a frame from the host.
   *
   * @throws {PluginError} `protocol_error`
   */
  take({ head, body }) {
    const { type, id } = head;
    const channel = this.#channels.get(id);
    // A client may go away while the answer that refuses it is on its way: then this concerns nobody.
    if (type === 'ws_close' && !channel) return;
    if (!FIELDS[type] || !type.startsWith('ws_') || (type === 'ws_open') !== !channel) {
      throw new PluginError('protocol_error', `${named(head)} is out of place`);
    }
    switch (type) {
      case 'ws_open':
        this.#open(head);
        break;
      case 'ws_message':
        this.#message(channel, head, body);
        break;
      case 'ws_credit':
        channel.addCredit(head.bytes);
        break;
      case 'ws_close':
        this.#channels.delete(id);
        channel.end(head.code, head.reason ?? '');
        break;
    }
  }

  #open(head) {
    const channel = new Channel(head, this, this.#session);
    this.#channels.set(head.id, channel);
    const run = channel.run().finally(() => {
      this.#runs.delete(run);
      this.#channels.delete(head.id); // as one that was refused
    });
    this.#runs.add(run);
  }

  #message(channel, head, body) {
    let message = body;
    if (head.text) {
      try {
        message = this.#utf8.decode(body);
      } catch {
        throw new PluginError('protocol_error', `the text of ${named(head)} is not UTF-8`);
      }
    }
    const fault = channel.receive(message, costOf(body));
    if (fault) throw new PluginError('protocol_error', `${named(head)} ${fault}`);
  }

  /** Ends each socket that the host has not closed, and resolves when all handlers have returned. */
  async finish() {
    for (const channel of this.#channels.values()) channel.end(1006, '');
    this.#channels.clear();
    await Promise.all(this.#runs);
  }
}

// The host's store -----------------------------------------------------------------------------------------------------

/**
 * @typedef {object} Entry
 * @property {Buffer} value
 * @property {number} rev the revision: every write in the namespace takes the next
 * @property {number} [expiresInMs] absent where the value does not expire
 */

/**
 * @typedef {object} WriteOptions
 * @property {number} [ttlMs] how long the value lives; for ever unless given
 * @property {number} [ifRev] write only where the key has this revision, or reject with `conflict`
 * @property {boolean} [ifAbsent] write only where the key is not there, or reject with `conflict`
 */

/**
 * The plugin's namespace of the host's key-value store. Keys are texts of 1 to 512 bytes, values at most 1 MiB.
 *
 * All calls share one connection, opened when it is first needed and again after it was lost. They may be made side by side,
 * and are performed in the order they are made. A call that was outstanding when the connection was lost rejects with the
 * code `disconnected` and is never repeated by the SDK: its write may have been made.
 *
 * Every method rejects with a PluginError that has the host's code, such as `bad_key`, `quota` or `busy`; a value that no frame
 * holds is not sent, and is `too_large`.
 */
class Kv {
  #link = null;
  #lastId = 0;

  /**
   * @param {string} key
   * @returns {Promise<Buffer | null>} the value, or null where there is none
   */
  async get(key) {
    return (await this.getEntry(key))?.value ?? null;
  }

  /**
   * @param {string} key
   * @returns {Promise<Entry | null>} the value with its revision, or null where there is none
   */
  async getEntry(key) {
    const { head, body } = await this.#call({ op: 'get', key });
    return head.found ? { value: body, rev: head.rev, expiresInMs: head.expires_in_ms } : null;
  }

  /**
   * @param {string} key
   * @param {string | Uint8Array} value
   * @param {WriteOptions} [options]
   * @returns {Promise<number>} the new revision
   */
  async set(key, value, options) {
    const { head } = await this.#call({ op: 'set', key, ...writeFields(options) }, toBytes(value));
    return head.rev;
  }

  /**
   * @param {string} key
   * @param {{ifRev?: number}} [options]
   * @returns {Promise<boolean>} whether the key was there
   */
  async delete(key, options) {
    const { head } = await this.#call({ op: 'delete', key, ...writeFields(options) });
    return head.found;
  }

  /**
   * Adds to a value that is a decimal 64-bit integer, 0 where there is none.
   *
   * @param {string} key
   * @param {number} [delta]
   * @param {{ttlMs?: number}} [options] `ttlMs` counts where this call makes the key
   * @returns {Promise<number | bigint>} the sum: a bigint where a number would not hold it exactly (beyond 2^53 − 1)
   */
  async incr(key, delta = 1, options) {
    const { text } = await this.#call({ op: 'incr', key, delta, ...writeFields(options) });
    return parseExact(text).value;
  }

  /**
   * Lists the keys in byte order. Pages are fetched as they are needed, so writes made meanwhile may show.
   *
   * @param {{prefix?: string, values?: boolean}} [options] only keys with this prefix; whether to fetch the values
   * @returns {AsyncGenerator<{key: string, rev: number, size: number, expiresInMs?: number, value?: Buffer}>}
   */
  async *list({ prefix, values = false } = {}) {
    let after;
    do {
      const { head, body } = await this.#call({ op: 'list', prefix, after, values, limit: LIST_PAGE });
      for (const { key, rev, size, expires_in_ms: expires, value_base64: value } of JSON.parse(body)) {
        yield { key, rev, size, expiresInMs: expires ?? undefined, value: value == null ? undefined : Buffer.from(value, 'base64') };
      }
      after = head.next;
    } while (after !== undefined);
  }

  /**
   * Makes 1 to 128 writes, all of them or none.
   *
   * @param {Array<{op: 'set' | 'delete' | 'incr', key: string, value?: string | Uint8Array, delta?: number}
   *   & WriteOptions>} writes
   * @returns {Promise<Array<{rev?: number, found?: boolean, value?: number | bigint}>>}
   *   of each write: `rev` for set, `found` for delete, `value` (as of `incr`) and `rev` for incr
   * @throws {PluginError} whose `index` is the place of the write that failed
   */
  async txn(writes) {
    const { body } = await this.#call({ op: 'txn' }, Buffer.from(JSON.stringify(writes.map(writeOf))));
    return parseExact(body.toString());
  }

  /**
   * Performs an operator's operation: what an `onKv` handler calls for those it has no reason to treat otherwise.
   *
   * @param {{op: string, key: string, value?: Buffer}} operation
   * @returns {Promise<{found?: boolean, rev?: number, value?: Buffer}>}
   */
  async perform({ op, key, value }) {
    switch (op) {
      case 'get': {
        const entry = await this.getEntry(key);
        return { found: entry !== null, rev: entry?.rev, value: entry?.value };
      }
      case 'set':
        return { rev: await this.set(key, value) };
      case 'delete':
        return { found: await this.delete(key) };
      default:
        throw new PluginError('bad_request', `there is no operation ${op}`);
    }
  }

  /** Sends one request and resolves to the reply. */
  async #call(fields, body = EMPTY) {
    // Half a surrogate pair has no form in UTF-8; the host would take the whole frame for a broken one.
    if (LONE_SURROGATE.test(fields.key ?? fields.prefix)) throw new PluginError('bad_key', 'the key is not Unicode');
    const id = ++this.#lastId;
    const parts = encodeFrame({ type: 'kv', id, ...fields }, body);
    this.#link ??= this.#connect();
    const { socket, pending } = this.#link;
    return new Promise((resolve, reject) => {
      pending.push({ id, op: fields.op, resolve, reject });
      writeParts(socket, parts);
    });
  }

  #connect() {
    const path = process.env.PLUGRACK_HOST_SOCKET;
    if (!path) throw new PluginError('disconnected', 'PLUGRACK_HOST_SOCKET is not set');
    const socket = connect(path);
    const decoder = new FrameDecoder();
    const link = { socket, pending: [] };
    const lost = (reason) => {
      if (this.#link === link) this.#link = null;
      socket.destroy();
      for (const { reject } of link.pending.splice(0)) reject(new PluginError('disconnected', reason));
    };
    socket.on('data', (chunk) => {
      try {
        for (const reply of decoder.push(chunk)) settle(link.pending.shift(), reply);
      } catch (error) {
        lost(error.message);
      }
    });
    socket.on('error', (error) => lost(`the connection to the host failed: ${error.message}`));
    socket.on('end', () => lost('the host ended the connection'));
    socket.on('close', () => lost('the connection to the host is closed'));
    return link;
  }
}

/** Hands a reply from the host to the call it answers. */
function settle(call, reply) {
  const { type, id, code, message, index } = reply.head;
  let fault = `${named(reply.head)} came where ${call ? `the reply to request ${call.id}` : 'nothing'} was due`;
  if (call?.id === id && type === 'error') return call.reject(new PluginError(code, message, index));
  if (call?.id === id && type === 'result') {
    fault = resultFault(call.op, reply.head, reply.body.length);
    if (!fault) return call.resolve(reply);
  }
  const error = new PluginError('protocol_error', fault);
  call?.reject(error);
  throw error;
}

function writeFields({ ttlMs, ifRev, ifAbsent } = {}) {
  return { ttl_ms: ttlMs, if_rev: ifRev, if_absent: ifAbsent };
}

/** A write of a transaction, as the protocol has it. */
function writeOf({ op, key, value, delta, ...options }) {
  const bytes = value instanceof Uint8Array;
  return {
    op,
    key,
    value: bytes ? undefined : value,
    value_base64: bytes ? Buffer.from(value).toString('base64') : undefined,
    delta,
    ...writeFields(options),
  };
}

/** Parses JSON in which a `value` may be any 64-bit integer; one that a number cannot hold exactly becomes a bigint. */
function parseExact(text) {
  // Quoting the long ones keeps their digits. No string is touched: a quotation mark in one is escaped.
  const quoted = text.replace(/"value"\s*:\s*(-?\d{16,})(?![\d.eE])/g, '"value":"$1"');
  return JSON.parse(quoted, (key, value) => {
    if (key !== 'value' || typeof value !== 'string') return value;
    return Number.isSafeInteger(Number(value)) ? Number(value) : BigInt(value);
  });
}

// Licences -------------------------------------------------------------------------------------------------------------

const TOKEN_HEADER = 'v4.public.';
const KEY_HEADER = 'k4.public.';
const ASSERTION = Buffer.from('plugrack/plugin-licence/v1'); // signed along, so that no other token is a licence
const KEY_SIZE = 32; // bytes of an Ed25519 public key
const SIGNATURE_SIZE = 64; // bytes
const MAX_TOKEN = 8192; // bytes; a usual token has about 600
const MAX_FOOTER = 256; // bytes, since it is read before its signature is checked
const MAX_NESTING = 127; // levels of objects and arrays: the same in every SDK
const MAX_GRACE_DAYS = 3650;
const DAY = 86400; // seconds
const CLOCK_SLACK = DAY; // a clock this far before the time of issue may be a slip; one further back has not been set
const WARNING = 30 * DAY; // before the end, as long as it may take to buy a licence
const SHOWN = 80; // characters of a claim in a message
const ASCII_SPACE = ' \t\n\f\r';
const KID = /^[A-Za-z0-9._-]{1,64}$/;
const JSON_TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\]:]|-?[0-9][0-9.eE+-]*/gs;

const isText = (value) => typeof value === 'string';
const areTexts = (value) => Array.isArray(value) && value.every(isText);
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const areLimits = (value) => isObject(value) && Object.values(value).every(isCount);
const isGrace = (value) => isCount(value) && value <= MAX_GRACE_DAYS;
const isTime = (value) => isText(value) && secondsOf(value) !== null;
const isDate = (value) => isText(value) && isTime(`${value}T00:00:00Z`);
const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);

/** Each claim of version 1 and its form. */
const CLAIMS = {
  v: Number.isInteger, jti: isText, iss: isText, aud: isText, inst: areTexts, iat: isTime, sub: isText, nbf: isTime, exp: isTime,
  grace_days: isGrace, upd: isDate, feat: areTexts, lim: areLimits, crit: areTexts,
};
const REQUIRED = ['v', 'jti', 'iss', 'aud', 'inst', 'iat'];

/** Inside this section: a token is not of its form. */
class Malformed extends Error {}

/**
 * A licence that holds. Times are as in the token: `YYYY-MM-DDTHH:MM:SSZ`, dates `YYYY-MM-DD`.
 *
 * @typedef {object} License
 * @property {string} id the licence's own, from its issuer
 * @property {string} issuer
 * @property {string | null} customer
 * @property {string} pluginId
 * @property {string[]} instances the instances it is for; `*` means all
 * @property {string} issued
 * @property {string | null} notBefore
 * @property {string | null} expires null: it does not
 * @property {number} graceDays how long it goes on after it has expired
 * @property {string | null} updatesUntil releases after this date are not covered
 * @property {Set<string>} features one that is not here is off
 * @property {Map<string, number>} limits
 * @property {'valid' | 'warning' | 'grace'} standing `warning`: it expires within 30 days; `grace`: it has expired
 * @property {number | null} daysLeft whole days, rounded up, until it expires (in `warning`) or the grace ends (in `grace`)
 */

/**
 * Checks a licence token.
 *
 * @param {string | null | undefined} token
 * @param {object} options
 * @param {Record<string, string>} options.keyring the name of each key and the key, `k4.public.…`
 * @param {string} options.pluginId
 * @param {string} options.instanceId
 * @param {string | null} [options.releaseDate] that of the plugin; without one it is not compared
 * @param {Date} [options.now] the time, that of the clock unless given
 * @param {string | null} [options.notBeforeTime] what the host says in `init`, a time that is past whatever the clock says
 * @returns {License}
 * @throws {LicenseError} with the code of the first check that fails
 * @throws {TypeError} an option is not of its form
 */
export function verifyLicense(token, options) {
  const { keyring, pluginId, instanceId, releaseDate = null, now = new Date(), notBeforeTime = null } = options;
  const keys = readKeyring(keyring);
  checkReleaseDate(releaseDate);
  const clock = Math.floor(now.getTime() / 1000);
  const mark = notBeforeTime === null ? clock : secondsOf(notBeforeTime);
  if (Number.isNaN(clock) || mark === null) throw new TypeError('a time is not of its form, YYYY-MM-DDTHH:MM:SSZ');
  const latest = Math.max(clock, mark);

  const text = trimAscii(token ?? '');
  if (text === '') {
    throw new LicenseError(
      'missing',
      `this plugin needs a licence for the instance ${instanceId}: get one from its vendor and set it with \`plugrack license `
        + `set ${pluginId} TOKEN\``,
    );
  }
  const { payload, signature, footer, kid } = wellFormed(() => readToken(text));
  if (!keys.has(kid)) {
    throw new LicenseError(
      'unknown_key',
      `it is signed with the key ${kid}, which this release of the plugin does not know: ask the vendor for a licence for this `
        + 'release, or install the release it is for',
    );
  }
  if (!isSigned(payload, footer, ASSERTION, signature, keys.get(kid))) {
    throw new LicenseError(
      'bad_signature',
      'its signature is wrong, so it has been changed or is not from the vendor: set it again exactly as the vendor sent it',
    );
  }
  const claims = wellFormed(() => readClaims(payload));

  if (claims.aud !== pluginId) {
    throw new LicenseError(
      'wrong_plugin',
      `it is for the plugin ${show(claims.aud)}, and this is ${pluginId}: set the one for this plugin`,
    );
  }
  if (!claims.inst.includes(instanceId) && !claims.inst.includes('*')) {
    throw new LicenseError(
      'wrong_instance',
      `it is for the instance ${show(claims.inst.join(', '))}, and this is ${instanceId}: ask the vendor for one for this `
        + 'instance',
    );
  }
  if (releaseDate !== null && 'upd' in claims && releaseDate > claims.upd) {
    throw new LicenseError(
      'update_not_covered',
      `it covers releases up to ${claims.upd}, and this one is of ${releaseDate}: renew it, or go back to a release that it `
        + 'covers',
    );
  }
  if (clock < secondsOf(claims.iat) - CLOCK_SLACK) {
    throw new LicenseError(
      'clock_not_set',
      `the clock says ${stamp(clock)}, but the licence was issued at ${claims.iat}: set the clock of this machine`,
    );
  }
  if ('nbf' in claims && latest < secondsOf(claims.nbf)) {
    throw new LicenseError(
      'not_yet_valid',
      `it is valid from ${claims.nbf} on, and it is ${stamp(latest)}: wait until then, or set one that is valid now`,
    );
  }
  return {
    id: claims.jti,
    issuer: claims.iss,
    customer: claims.sub ?? null,
    pluginId: claims.aud,
    instances: claims.inst,
    issued: claims.iat,
    notBefore: claims.nbf ?? null,
    expires: claims.exp ?? null,
    graceDays: claims.grace_days ?? 0,
    updatesUntil: claims.upd ?? null,
    features: new Set(claims.feat),
    limits: new Map(Object.entries(claims.lim ?? {})),
    ...standingOf(claims, latest),
  };
}

function trimAscii(text) {
  let start = 0;
  let end = text.length;
  while (start < end && ASCII_SPACE.includes(text[start])) start++;
  while (start < end && ASCII_SPACE.includes(text[end - 1])) end--;
  return text.slice(start, end);
}

function standingOf(claims, latest) {
  if (!('exp' in claims)) return { standing: 'valid', daysLeft: null };
  const graceDays = claims.grace_days ?? 0;
  const end = secondsOf(claims.exp);
  const last = end + graceDays * DAY;
  if (latest >= last) {
    const grace = graceDays > 0 ? ` and its ${graceDays} days of grace are over` : '';
    throw new LicenseError(
      'expired',
      `it expired at ${claims.exp}${grace}: get a new one from the vendor and set it with \`plugrack license set ${claims.aud} `
        + `TOKEN\``,
    );
  }
  if (latest >= end) return { standing: 'grace', daysLeft: Math.ceil((last - latest) / DAY) };
  if (end - latest <= WARNING) return { standing: 'warning', daysLeft: Math.ceil((end - latest) / DAY) };
  return { standing: 'valid', daysLeft: null };
}

/** What `read` gives; what is not of its form is the refusal of it. */
function wellFormed(read) {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof Malformed)) throw error;
    const what = `this is no licence token, since ${error.message}: set the whole line as the vendor sent it`;
    throw new LicenseError('malformed', what);
  }
}

function readToken(token) {
  if (Buffer.byteLength(token) > MAX_TOKEN) throw new Malformed(`it has more than ${MAX_TOKEN} bytes`);
  const { payload, signature, footer } = splitToken(token);
  if (footer.length > MAX_FOOTER) throw new Malformed(`its footer has more than ${MAX_FOOTER} bytes`);
  const fields = strictJson(footer, 'its footer');
  const { kid } = fields;
  if (Object.values(fields).some((value) => typeof value === 'object' && value !== null) || !isText(kid) || !KID.test(kid)) {
    throw new Malformed('its footer does not name a key');
  }
  return { payload, signature, footer, kid };
}

/** Takes a PASETO v4.public token apart and checks nothing of it. */
export function splitToken(token) {
  if (!token.startsWith(TOKEN_HEADER)) throw new Malformed(`it does not begin with ${TOKEN_HEADER}`);
  const [body, ...footer] = token.slice(TOKEN_HEADER.length).split('.');
  if (footer.length > 1) throw new Malformed('it has too many parts');
  const signed = fromBase64url(body);
  const end = signed.length - SIGNATURE_SIZE;
  if (end <= 0) throw new Malformed('it is too short');
  return { payload: signed.subarray(0, end), signature: signed.subarray(end), footer: fromBase64url(footer[0] ?? '') };
}

/** Whether a PASETO v4.public token is signed with the private half of this key (32 bytes). */
export function isSigned(payload, footer, assertion, signature, key) {
  try {
    const jwk = { kty: 'OKP', crv: 'Ed25519', x: key.toString('base64url') };
    const message = preAuthenticationEncoding(Buffer.from(TOKEN_HEADER), payload, footer, assertion);
    return verify(null, message, createPublicKey({ key: jwk, format: 'jwk' }), signature);
  } catch {
    return false; // such a key has signed nothing
  }
}

/** PASETO's encoding of what is signed: the pieces with their number and lengths, so that no border can move. */
function preAuthenticationEncoding(...pieces) {
  const number = (count) => {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(BigInt(count));
    return bytes;
  };
  return Buffer.concat([number(pieces.length), ...pieces.flatMap((piece) => [number(piece.length), piece])]);
}

function fromBase64url(text) {
  const bytes = Buffer.from(text, 'base64url');
  // The decoder is lenient: the one text that stands for these bytes is what they are encoded to.
  if (bytes.toString('base64url') !== text) throw new Malformed('it is not base64url without padding');
  return bytes;
}

function readKeyring(keyring) {
  return new Map(Object.entries(keyring).map(([kid, text]) => [kid, readKey(kid, text)]));
}

function readKey(kid, text) {
  const key = Buffer.from(String(text).slice(KEY_HEADER.length), 'base64url');
  if (KID.test(kid) && key.length === KEY_SIZE && KEY_HEADER + key.toString('base64url') === text) return key;
  throw new TypeError(
    `the licence key ${JSON.stringify(kid)} is not a name of 1 to 64 letters, digits and ._- with a ${KEY_HEADER}… key of `
      + `${KEY_SIZE} bytes, as \`plugrack license keygen\` prints it`,
  );
}

function checkReleaseDate(text) {
  if (text === null || isDate(text)) return;
  throw new TypeError(`the release date ${JSON.stringify(text)} is not of the form YYYY-MM-DD`);
}

/** The claims of a payload whose signature is right. */
function readClaims(payload) {
  const claims = strictJson(payload, 'its payload');
  if (!Number.isInteger(claims.v)) throw new Malformed('the claim v is not an integer');
  if (claims.v !== 1) {
    throw new LicenseError(
      'unsupported',
      `it is of version ${claims.v}, which this release of the plugin does not know: update the plugin`,
    );
  }
  const critical = 'crit' in claims ? claims.crit : [];
  if (!areTexts(critical)) throw new Malformed('the claim crit is not of its form');
  const unknown = critical.filter((name) => !Object.hasOwn(CLAIMS, name));
  if (unknown.length > 0) {
    throw new LicenseError(
      'unsupported',
      `it relies on ${show(unknown.join(', '))}, which this release of the plugin does not know: update the plugin`,
    );
  }
  for (const name of REQUIRED) if (!(name in claims)) throw new Malformed(`the claim ${name} is missing`);
  for (const [name, isOfForm] of Object.entries(CLAIMS)) {
    if (name in claims && !isOfForm(claims[name])) throw new Malformed(`the claim ${name} is not of its form`);
  }
  return claims;
}

/**
 * Parses a JSON object that every parser reads alike: no key twice, no number beyond a float, no half of a surrogate pair.
 * A number that is not written as an integer of 64 bits becomes null, since no claim is one and `1.0` would pass for 1.
 */
function strictJson(bytes, what) {
  const open = []; // per level: the keys of an object so far, or null for an array
  let string = null; // the latest
  const check = (token) => {
    if (token === '{' || token === '[') open.push(token === '{' ? new Set() : null);
    else if (token === '}' || token === ']') open.pop();
    else if (token[0] === '"') {
      string = JSON.parse(token);
      if (LONE_SURROGATE.test(string)) throw new Malformed();
    } else if (token === ':') {
      if (open.at(-1).has(string)) throw new Malformed();
      open.at(-1).add(string);
    } else if (!Number.isFinite(Number(token))) throw new Malformed();
    else if (!isInteger64(token)) return 'null';
    if (open.length > MAX_NESTING) throw new Malformed();
    return token;
  };
  try {
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    JSON.parse(text); // the grammar, on which the tokens rely
    const value = JSON.parse(text.replace(JSON_TOKEN, check));
    if (isObject(value)) return value;
  } catch {
    // What it is to be told about is the same, whatever is wrong with it.
  }
  throw new Malformed(`${what} is not a JSON object of its form`);
}

function isInteger64(token) {
  return /^-?[0-9]+$/.test(token) && token !== '-0' && BigInt(token) >= -(2n ** 63n) && BigInt(token) < 2n ** 64n;
}

/** The seconds since 1970 of a time of exactly this form, from the year 1 to 9999, or null. */
function secondsOf(text) {
  const time = new Date(text);
  const exact = !Number.isNaN(time.getTime()) && time.toISOString().replace('.000Z', 'Z') === text && text > '0001';
  return exact ? time.getTime() / 1000 : null;
}

function stamp(seconds) {
  return new Date(seconds * 1000).toISOString().replace('.000Z', 'Z');
}

/** What a licence says, in one line and not too long. */
function show(text) {
  return JSON.stringify(text.slice(0, SHOWN)) + (text.length > SHOWN ? '…' : '');
}

// Node listeners -------------------------------------------------------------------------------------------------------

/**
 * A handler that answers with a listener as `http.createServer` takes it, such as an Express application:
 *
 *     plugin.onHttp(fromNode(app));
 *
 * A handler may also call it for some requests, and answer others by itself. The listener gets the request and response objects
 * of node:http, on a socket in memory. `req.url` begins below the plugin's route, which is in `x-forwarded-prefix`. An error that
 * it throws, or rejects with, is logged and answered with 500. A body that comes in several frames must be read before the answer
 * begins: the rest is dropped then, and the answer of a listener that goes on reading is cut.
 *
 * There are no `upgrade` events, so a library that serves WebSocket on a server of node:http, such as `ws`, gets no connection:
 * `plugin.onWebSocket` takes its place beside the listener. To run such a library unchanged, make the program an application
 * (`kind = "http"` in its manifest, docs/apps.md).
 *
 * @param {(req: import('node:http').IncomingMessage, res: import('node:http').ServerResponse) => unknown} app
 * @returns {(request: HttpRequest) => Promise<Reply>}
 */
export function fromNode(app) {
  if (typeof app !== 'function') throw new TypeError(`fromNode takes a function (req, res), not ${describe(app)}`);
  // The host bounds size, number and time of requests. A head is no larger than in its frame, but for what separates its parts.
  const limits = { maxHeaderSize: 2 * MAX_HEAD, requireHostHeader: false, headersTimeout: 0, requestTimeout: 0 };
  const server = createHttpServer(limits, async (req, res) => {
    req.socket.attach(req, res);
    try {
      await app(req, res);
    } catch (error) {
      answerFailure(res, error);
    }
  });
  // Such as a method that node:http does not know.
  server.on('clientError', (error, socket) => socket.end('HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n'));
  return (request) => {
    const socket = new ListenerSocket(request);
    server.emit('connection', socket);
    return socket.reply();
  };
}

/** Answers 500 for a listener that has thrown, or cuts its answer. */
function answerFailure(res, error) {
  console.error(error);
  if (res.headersSent) {
    if (!res.writableEnded) res.destroy();
    return;
  }
  for (const name of res.getHeaderNames()) res.removeHeader(name);
  res.writeHead(500, { 'content-type': 'text/plain; charset=utf-8' }).end('internal error\n');
}

/**
 * The bytes of a request as node:http reads them.
 *
 * @param {HttpRequest} request
 * @returns {AsyncGenerator<Buffer>}
 */
async function* requestBytes(request) {
  const { body } = HttpRequest.bridged(request);
  const chunked = body.isExpected && request.headers.get('content-length') === null;
  const url = request.query ? `${request.path}?${request.query}` : request.path;
  const lines = [`${request.method} ${url} HTTP/1.1`, ...[...request.headers].map(([name, value]) => `${name}: ${value}`)];
  lines.push(chunked ? 'transfer-encoding: chunked\r\nconnection: close' : 'connection: close', '\r\n');
  yield Buffer.from(lines.join('\r\n'), 'latin1');
  while (body.isExpected) {
    const chunk = await body.read();
    if (!chunked) yield chunk;
    else if (chunk.length > 0) yield Buffer.concat([Buffer.from(`${chunk.length.toString(16)}\r\n`), chunk, Buffer.from('\r\n')]);
  }
  if (chunked) yield Buffer.from('0\r\n\r\n');
}

/** Takes apart what node:http writes in answer to one request, up to the end of the connection. */
class AnswerParser {
  /** Status and header pairs, or null before they are there. */
  head = null;
  isComplete = false; // the whole body has come
  endsWithConnection = false; // only the end of the connection tells its end
  #rest = EMPTY; // what is not parsed yet
  #chunked = false;
  #left = 0; // bytes of the body, or of the chunk

  /** Takes the next bytes; returns the pieces of the body in them. */
  push(bytes) {
    let body = bytes;
    while (!this.head) {
      this.#rest = Buffer.concat([this.#rest, body]);
      const end = this.#rest.indexOf('\r\n\r\n');
      if (end < 0) return [];
      this.#parseHead(this.#rest.latin1Slice(0, end));
      body = this.#rest.subarray(end + 4);
      this.#rest = EMPTY;
    }
    return this.#chunked ? this.#dechunk(body) : this.#count(body);
  }

  #parseHead(text) {
    const [first, ...lines] = text.split('\r\n');
    const status = Number(first.split(' ', 2)[1]);
    if (status < 200) return; // such as 103, for which the protocol has no message
    const headers = lines.map((line) => {
      const colon = line.indexOf(':');
      return [line.slice(0, colon), line.slice(colon + 1).trim()];
    });
    const value = (name) => headers.find(([each]) => each.toLowerCase() === name)?.[1];
    this.#chunked = value('transfer-encoding') !== undefined;
    const length = value('content-length');
    this.endsWithConnection = !this.#chunked && length === undefined;
    this.#left = this.#chunked ? 0 : Number(length ?? Infinity);
    this.isComplete = this.#left === 0 && !this.#chunked;
    const ours = new Set(['connection', 'keep-alive', 'transfer-encoding']);
    this.head = { status, headers: headers.filter(([name]) => !ours.has(name.toLowerCase())) };
  }

  /** What is longer than its content-length is passed on: the host says so, and cuts the answer. */
  #count(bytes) {
    this.#left -= bytes.length;
    this.isComplete = this.#left <= 0;
    return bytes.length > 0 ? [bytes] : [];
  }

  #dechunk(bytes) {
    const pieces = [];
    let rest = Buffer.concat([this.#rest, bytes]);
    for (;;) {
      const piece = rest.subarray(0, this.#left);
      if (piece.length > 0) pieces.push(piece);
      this.#left -= piece.length;
      rest = rest.subarray(piece.length);
      const end = this.#left > 0 ? -1 : rest.indexOf('\r\n');
      if (end < 0) break;
      const line = rest.latin1Slice(0, end);
      rest = rest.subarray(end + 2);
      if (line === '' || this.isComplete) continue; // the end of a chunk, or a trailer
      this.#left = parseInt(line, 16);
      this.isComplete = this.#left === 0;
    }
    this.#rest = Buffer.from(rest);
    return pieces;
  }
}

/**
 * The socket of one request: node:http reads the request from it, and writes the answer to it.
 *
 * Both ways have back-pressure: the body is received as the listener reads it, and a write is done once its pieces are sent.
 */
class ListenerSocket extends Duplex {
  #request;
  #source;
  #req = null;
  #res = null;
  #answer = new AnswerParser();
  #pieces = []; // of the answer's body, not taken yet
  #written = null; // tells node:http that they are
  #unwanted = false; // what else comes of it is dropped
  #ended = false; // node:http has written all
  #changed = null; // wakes who waits for the head or the next piece

  /** @param {HttpRequest} request */
  constructor(request) {
    super();
    this.#request = request;
    this.#source = requestBytes(request);
    this.remoteAddress = request.remote || undefined;
    this.remoteFamily = { 4: 'IPv4', 6: 'IPv6' }[isIP(request.remote)];
    this.encrypted = request.headers.get('x-forwarded-proto') === 'https';
    const { gone } = HttpRequest.bridged(request);
    const leave = () => this.destroy();
    gone.addEventListener('abort', leave);
    this.on('close', () => gone.removeEventListener('abort', leave));
  }

  // What listeners may ask of a socket, and what has no meaning for this one: its times are the host's.

  setTimeout() {
    return this;
  }

  setNoDelay() {
    return this;
  }

  setKeepAlive() {
    return this;
  }

  /** Says what node:http has made of the request. */
  attach(req, res) {
    this.#req = req;
    this.#res = res;
  }

  /** Resolves to the answer once its head is there. */
  async reply() {
    while (!this.#answer.head && !this.#ended && !this.destroyed) await this.#change();
    const { head, isComplete } = this.#answer;
    if (!head) throw new Error('the listener closed its connection without an answer');
    const reply = new Reply(null, head);
    if (this.#request.method === 'HEAD' || head.status === 204 || head.status === 304) {
      const timer = setTimeout(() => this.destroy(), HEAD_TIME);
      this.on('close', () => clearTimeout(timer));
      this.#drop();
    } else if (isComplete) {
      reply.body = Buffer.concat(this.#pieces);
      this.#drop();
    } else {
      reply.body = { [Symbol.asyncIterator]: () => this.#body(), destroy: () => this.#unwanted || this.destroy() };
    }
    return reply;
  }

  async *#body() {
    for (;;) {
      yield* this.#pieces.splice(0);
      this.#take();
      if (this.#pieces.length > 0) continue;
      if (this.#answer.isComplete || (this.#ended && this.#answer.endsWithConnection)) break;
      if (this.#ended || this.destroyed) throw new Error('the listener ended its answer early');
      await this.#change();
    }
    this.#drop();
  }

  /** Lets the listener write what else it has, for nobody. */
  #drop() {
    this.#unwanted = true;
    this.#pieces.length = 0;
    this.#take();
  }

  #take() {
    const written = this.#written;
    this.#written = null;
    written?.();
  }

  #change() {
    return new Promise((resolve) => (this.#changed = resolve));
  }

  _read() {
    this.#source.next().then(
      // The end of the request is not that of the connection: node:http would take that for a client that has gone.
      ({ value, done }) => done || this.push(value),
      (error) => this.#readingFailed(error),
    );
  }

  /** The rest of the body does not come, as a rule since the answer has begun. That concerns a listener that reads on. */
  #readingFailed(error) {
    const [req, res] = [this.#req, this.#res];
    const check = () => {
      const reads = req.readableFlowing || req.listenerCount('readable') > 0;
      if (!reads || res.writableEnded || this.destroyed) return;
      console.error(error);
      this.destroy();
    };
    if (!req) {
      this.destroy();
      return;
    }
    req.on('resume', check);
    req.on('newListener', (name) => name === 'readable' && process.nextTick(check));
    check();
  }

  _writev(chunks, callback) {
    for (const { chunk } of chunks) this.#pieces.push(...this.#answer.push(chunk));
    this.#written = callback;
    if (this.#unwanted) this.#drop();
    else if (!this.#answer.head) this.#take();
    this.#changed?.();
  }

  _final(callback) {
    this.#ended = true;
    callback();
    this.#changed?.();
    process.nextTick(() => this.destroy());
  }

  _destroy(error, callback) {
    callback(error);
    this.#changed?.();
  }
}

// The plugin -----------------------------------------------------------------------------------------------------------

/**
 * Accepts connections on a Unix socket for as long as the process lives, through a want of files and memory. Ends the process
 * where nothing can be accepted for another reason.
 *
 * @param {string} path
 * @param {(socket: import('node:net').Socket) => void} accepted
 * @param {(error: Error) => void} [complain] tells of a shortage
 */
function listen(path, accepted, complain = throttled('cannot accept connections, and tries again')) {
  const server = createServer(accepted);
  server.once('error', (error) => {
    if (!SHORTAGES.has(error.code)) {
      console.error(`plugrack: cannot accept connections on ${path}: ${error.message}`);
      process.exit(EXIT_FAILED);
    }
    complain(error);
    // An open listener would fail again at once, without end. Connections that are open stay so.
    server.close();
    setTimeout(listen, SHORTAGE_PAUSE, path, accepted, complain);
  });
  server.listen(path);
}

/** Logs an error that repeats at most once in a while, with how often it came meanwhile. */
function throttled(message) {
  let next = -Infinity;
  let suppressed = 0;
  return (error) => {
    const now = performance.now();
    if (now < next) {
      suppressed++;
      return;
    }
    const more = suppressed > 0 ? ` (${suppressed} times more since the last such line)` : '';
    console.error(`plugrack: ${message}${more}: ${error.message}`);
    next = now + SAY_EVERY;
    suppressed = 0;
  };
}

/** A plugin: what it is, and how it answers. */
export class Plugin {
  #metadata;
  #handlers;
  #license;
  #open = new Set(); // the WebSockets

  /** The plugin's key-value store. */
  kv = new Kv();

  /**
   * @param {object} metadata
   * @param {string} metadata.id lower-case letters, digits and `-`; names the plugin everywhere
   * @param {string} metadata.name for people
   * @param {string} metadata.version
   * @param {string} metadata.icon an emoji, or a `data:image/…` URI
   * @param {string} [metadata.route] such as `/notes`; a plugin has a route, host names, or both
   * @param {string[]} [metadata.host] host names that are the plugin's as a whole, such as `wiki.example.org` or `*.example.org`
   * @param {'rewrite'} [metadata.belowRoute] the host puts the route before paths in the headers of responses
   * @param {'redirect'} [metadata.trailingSlash] the host redirects the bare route to the route with a slash
   * @param {number} [metadata.concurrency] how many requests to serve at once, 1 to 256, and 16 unless given; an open stream
   *   counts as one. With 1 a handler is not called before the one under way has answered, or its request was given up
   * @param {string} [metadata.description]
   * @param {string} [metadata.author]
   * @param {string} [metadata.homepage]
   * @param {string[]} [metadata.speaks] the message types beyond protocol 1 that the plugin understands; `websocket` is added
   *   where there is a handler for WebSockets
   * @param {string[]} [metadata.origins] origins of other sites whose pages may open a WebSocket, such as
   *   `https://app.example.org`, or `*` for all
   * @param {Record<string, string> | null} [metadata.licenseKeys] for a plugin that runs only with a licence: the vendor's public
   *   keys by their names, as for `verifyLicense`
   * @param {string | null} [metadata.releaseDate] of this release, which the licence must cover: `YYYY-MM-DD`
   */
  constructor({
    id, name, version, icon, route, host, belowRoute, trailingSlash, concurrency = CONCURRENCY, description, author, homepage,
    speaks, origins, licenseKeys = null, releaseDate = null,
  }) {
    if (licenseKeys !== null) {
      readKeyring(licenseKeys); // a slip of the author shows at once, not on a customer's machine
      checkReleaseDate(releaseDate);
    }
    this.#license = ({ license, instanceId, notBeforeTime }) =>
      licenseKeys && verifyLicense(license, { keyring: licenseKeys, pluginId: id, instanceId, releaseDate, notBeforeTime });
    this.#metadata = {
      id, name, version, icon, route, host, below_route: belowRoute, trailing_slash: trailingSlash, protocol: PROTOCOL,
      concurrency, description, author, homepage, speaks, origins,
    };
    this.#handlers = {
      init: () => {},
      http: () => new Reply('not found\n', { status: 404 }),
      kv: (operation) => this.kv.perform(operation),
      socketOpen: null,
      socketMessage: () => {},
      socketClose: () => {},
    };
  }

  #handleSockets(name, handler) {
    this.#handlers[name] = handler;
    const { speaks = [] } = this.#metadata;
    if (!speaks.includes('websocket')) this.#metadata.speaks = [...speaks, 'websocket'];
    return this;
  }

  /**
   * Sets what answers HTTP requests. The handler returns a `Reply`, or what the body of one may be; null for an empty body.
   * An `HttpError` it throws answers with that status; any other error is logged, and answered with 500.
   *
   * @param {(request: HttpRequest) => unknown} handler
   * @returns {this}
   */
  onHttp(handler) {
    this.#handlers.http = handler;
    return this;
  }

  /**
   * Sets what runs before the first request, within 10 s. A `Refuse` it throws is permanent; after any other error the
   * process exits and the host starts it again.
   *
   * @param {(context: {instanceId: string, pluginId: string, socketPath: string, hostSocket: string, logPath: string,
   *   dataDir: string, license: string | null, config: object, host: {name: string, version: string},
   *   notBeforeTime: string | null, granted: License | null}) => unknown} handler
   *   `license` is the token as the operator has set it; `granted` is that licence, checked, of a plugin with `licenseKeys`
   * @returns {this}
   */
  onInit(handler) {
    this.#handlers.init = handler;
    return this;
  }

  /**
   * Sets what performs the operator's reads and writes of the plugin's keys; by default `plugin.kv.perform`.
   * A `PluginError` it throws reaches the operator with its code and message.
   *
   * @param {(operation: {op: 'get' | 'set' | 'delete', key: string, value?: Buffer}) =>
   *   {found?: boolean, rev?: number, value?: string | Uint8Array} | Promise<object>} handler
   * @returns {this}
   */
  onKv(handler) {
    this.#handlers.kv = handler;
    return this;
  }

  /**
   * Sets what handles the messages of WebSockets: a string for text, a Buffer for binary. The handlers of one socket are called
   * one after another, in the order of the messages. Those of different sockets run side by side, unless `concurrency` is 1. A
   * client is held up while 64 KiB of its messages wait for their handler.
   *
   * An error that a handler throws is logged, and closes the socket with 1011. A `SocketClosed` of a socket whose client has gone
   * is not logged. With `concurrency` 1 a handler that awaits `send` holds up all others until its client reads: `broadcast` waits
   * for nobody.
   *
   * @param {(socket: ClientSocket, message: string | Buffer) => unknown} handler
   * @returns {this}
   */
  onWebSocket(handler) {
    return this.#handleSockets('socketMessage', handler);
  }

  /**
   * Sets what decides about a new WebSocket; without it each is accepted. The handler refuses the socket by returning a `Reply`
   * with a status of 300 to 599 and a whole body of at most 1 MiB, or by throwing an `HttpError`. Any other error is logged, and
   * refuses it with 500. Whatever else the handler returns, the socket is accepted. It may set `socket.protocol`.
   *
   * What the handler sends is held until the socket is accepted. A `send` beyond the credit (at first 64 KiB) accepts it at once,
   * since there is no more credit before. So does `socket.close`. From then on it cannot be refused.
   *
   * @param {(socket: ClientSocket) => unknown} handler
   * @returns {this}
   */
  onWebSocketOpen(handler) {
    return this.#handleSockets('socketOpen', handler);
  }

  /**
   * Sets what is called once at the end of each WebSocket that was not refused, after the handlers of its messages. The code is
   * that of the close frame, undefined if the client gave none, or 1006 if client or host went away without one.
   *
   * @param {(socket: ClientSocket, code: number | undefined, reason: string) => unknown} handler
   * @returns {this}
   */
  onWebSocketClose(handler) {
    return this.#handleSockets('socketClose', handler);
  }

  /**
   * The WebSockets that are open now.
   *
   * @returns {ClientSocket[]}
   */
  get sockets() {
    return [...this.#open];
  }

  /**
   * Sends a message to many WebSockets and waits for none. A socket that has no credit left is closed with 1013, so that its
   * client connects again instead of missing the message. One that is closed is passed over.
   *
   * @param {string | Uint8Array} message
   * @param {Iterable<ClientSocket>} [to] all that are open unless given
   * @returns {number} how many sockets it was sent to
   * @throws {RangeError} it has more than 1 MiB
   */
  broadcast(message, to = this.#open) {
    const parcel = parcelOf(message);
    let count = 0;
    for (const socket of [...to]) if (ClientSocket.channelOf(socket).post(parcel)) count++;
    return count;
  }

  /**
   * Does what the process was started for: prints the metadata and exits, or serves until the host shuts the plugin down.
   * SIGTERM keeps its default, which is to end the process at once.
   */
  run() {
    if (process.argv[2] === '--metadata') {
      process.stdout.write(`${JSON.stringify(this.#metadata)}\n`, () => process.exit(0));
      return;
    }
    const path = process.env.PLUGRACK_SOCKET;
    if (!path) {
      console.error(`${this.#metadata.id}: PLUGRACK_SOCKET is not set: plugrack starts this plugin. Try --metadata.`);
      process.exit(EXIT_USAGE);
    }
    const capacity = new Capacity(this.#metadata.concurrency);
    const sockets = { open: this.#open, running: 0 };
    const state = { connections: new Set(), capacity, sockets, initialized: false, ready: false, stopping: false };
    const session = { handlers: this.#handlers, license: this.#license, speaks: this.#metadata.speaks ?? [], ...state };
    listen(path, (socket) => new Connection(socket, session));
  }
}
