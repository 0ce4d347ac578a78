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
 * What a plugin prints goes to its log. Sizes are in bytes, times in milliseconds.
 */

import { connect, createServer } from 'node:net';

const PROTOCOL = 1;
const PREFIX = 8; // the two lengths before each frame
const MAX_HEAD = 65536;
const MAX_BODY = 1048576;
const MAX_QUEUED = 1048576; // received and not yet handled, on one connection
const COPY_BELOW = 16384; // up to here copying a body beside its head is cheaper than a vectored write
const BODY_LIMIT = 1048576; // what reading a whole body takes unless told otherwise
const LIST_PAGE = 1000;
const EXIT_FAILED = 1;
const EXIT_USAGE = 64;
const EXIT_REFUSED = 78;
const EMPTY = Buffer.alloc(0);
const LONE_SURROGATE = /\p{Surrogate}/u;

/**
 * An error with a code. The host's refusals arrive as one; one thrown by an `onKv` handler reaches the operator.
 * Besides the host's codes the SDK uses `disconnected` (the host's socket is gone, and whether an outstanding write
 * was made is unknown), `too_large` (it does not fit a frame) and `protocol_error`.
 */
export class PluginError extends Error {
  name = 'PluginError';

  /**
   * @param {string} code in snake_case, for programs
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

  /**
   * @param {string} message what the operator is shown
   * @param {string} [code]
   */
  constructor(message, code = 'refused') {
    super(code, message);
  }
}

/** Thrown by an `onHttp` handler: answers with this status and the message as plain text. */
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
      const { head, text } = this.#parse(this.#take(this.#headLength));
      this.#headLength = 0;
      yield { head, text, body: this.#take(this.#bodyLength), size };
    }
  }

  #parse(bytes) {
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
  #params;

  constructor(head, body, signal) {
    /** Such as `GET`. */
    this.method = head.method;
    /** What follows the mount, not decoded; begins with `/`. */
    this.path = head.path;
    /** What follows the `?`, not decoded; empty where there is none. */
    this.query = head.query ?? '';
    /** The plugin's route: what links to the plugin's own pages begin with. */
    this.mount = head.mount;
    this.headers = new HeaderList(head.headers);
    /** The client's address; empty when it is not known. */
    this.remote = head.remote;
    /** An AbortSignal: the client has gone, or the plugin is stopping. A stream without an end ends on it. */
    this.signal = signal;
    this.#body = body;
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
  const code = error instanceof PluginError ? error.code : 'internal';
  // Cut to fit a head, and sent through bytes since half a surrogate pair is not Unicode.
  const message = Buffer.from(String(error?.message ?? error).slice(0, 4096)).toString();
  return encodeFrame({ type: 'error', id, code, message });
}

/** Lets go of a stream, read or not: a Node stream is destroyed, a web stream cancelled, a generator returned. */
function release(stream) {
  return stream.destroy?.() ?? stream.cancel?.() ?? stream.return?.();
}

// The connections from the host ----------------------------------------------------------------------------------------

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
  #stopping = false;
  #controller = null; // of the request under way
  #arrived = null; // wakes who waits for a frame
  #drained = null; // wakes who waits for the socket to take more

  /**
   * @param {import('node:net').Socket} socket
   * @param {{handlers: object, connections: Set<Connection>, initialized: boolean, ready: boolean, stopping: boolean}} session
   *   what the connections of a process share
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
      if (session.stopping && session.connections.size === 0) process.exit(0);
    });
    this.#serve().catch((error) => {
      if (!this.#closed || error?.name !== 'AbortError') console.error(error);
      this.#close();
    });
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
      await new Promise((resolve) => (this.#arrived = resolve));
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
    this.#queue.length = 0;
    this.#socket.destroy();
    this.#controller?.abort();
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

  async #init({ id, ...fields }) {
    this.#session.initialized = true;
    try {
      await this.#session.handlers.init({
        instanceId: fields.instance_id,
        pluginId: fields.plugin_id,
        socketPath: fields.socket_path,
        hostSocket: fields.host_socket,
        logPath: fields.log_path,
        dataDir: fields.data_dir,
        license: fields.license,
        config: fields.config,
        host: fields.host,
      });
    } catch (error) {
      const refused = error instanceof Refuse;
      console.error(refused ? error.message : error);
      writeParts(this.#socket, errorFrame(id, error));
      this.#socket.end(() => process.exit(refused ? EXIT_REFUSED : EXIT_FAILED));
      return;
    }
    this.#session.ready = true;
    await this.#send(encodeFrame({ type: 'ready', id }));
  }

  async #kv({ head: { id, op, key }, body }) {
    let answer;
    try {
      const { found, rev, value } = (await this.#session.handlers.kv({ op, key, value: op === 'set' ? body : undefined })) ?? {};
      answer = encodeFrame({ type: 'result', id, found, rev }, value == null ? EMPTY : toBytes(value));
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
      const result = await this.#session.handlers.http(new HttpRequest(frame.head, body, signal));
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
    if (frame) this.#reject(`${frame.head.type} is out of place in a body`);
    throw abortError('the connection ended in a body');
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
 * Every method rejects with a PluginError that has the host's code, such as `bad_key`, `too_large`, `quota` or `busy`.
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
      for (const { key, rev, size, expires_in_ms: expiresInMs, value_base64: value } of JSON.parse(body)) {
        yield { key, rev, size, expiresInMs, value: value === undefined ? undefined : Buffer.from(value, 'base64') };
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
      pending.push({ id, resolve, reject });
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
  if (call?.id === id && type === 'result') call.resolve(reply);
  else if (call?.id === id && type === 'error') call.reject(new PluginError(code, message, index));
  else {
    const error = new PluginError('protocol_error', `${type} ${id} answers no request`);
    call?.reject(error);
    throw error;
  }
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
  const quoted = text.replace(/"value":\s*(-?\d{16,})/g, '"value":"$1"');
  return JSON.parse(quoted, (key, value) => {
    if (key !== 'value' || typeof value !== 'string') return value;
    return Number.isSafeInteger(Number(value)) ? Number(value) : BigInt(value);
  });
}

// The plugin -----------------------------------------------------------------------------------------------------------

/** A plugin: what it is, and how it answers. */
export class Plugin {
  #metadata;
  #handlers;

  /** The plugin's key-value store. */
  kv = new Kv();

  /**
   * @param {object} metadata
   * @param {string} metadata.id lower-case letters, digits and `-`; names the plugin everywhere
   * @param {string} metadata.name for people
   * @param {string} metadata.version
   * @param {string} metadata.icon an emoji, or a `data:image/…` URI
   * @param {string} metadata.route such as `/notes`
   * @param {number} [metadata.concurrency] how many requests to serve at once, 1 to 256; an open stream counts as one
   * @param {string} [metadata.description]
   * @param {string} [metadata.author]
   * @param {string} [metadata.homepage]
   */
  constructor({ id, name, version, icon, route, concurrency = 1, description, author, homepage }) {
    this.#metadata = { id, name, version, icon, route, protocol: PROTOCOL, concurrency, description, author, homepage };
    this.#handlers = {
      init: () => {},
      http: () => new Reply('not found\n', { status: 404 }),
      kv: (operation) => this.kv.perform(operation),
    };
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
   *   dataDir: string, license: string | null, config: object, host: {name: string, version: string}}) => unknown} handler
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
    const session = { handlers: this.#handlers, connections: new Set(), initialized: false, ready: false, stopping: false };
    createServer((socket) => new Connection(socket, session)).listen(path);
  }
}
