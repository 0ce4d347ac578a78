//! A directory as a web site: the plugins of the kind `static`, which have no process.
//!
//! A worker opens its [`Site`] once, and calls [`Site::serve`] for each request. A small file costs one open, one fstat, one read and one
//! write. Nothing about files is cached, so a change is seen by the next request.
//!
//! What is never served looks like what is not there: a file behind a link out of the root, a device, and a name that begins with a dot.

mod coding;
mod conditional;
mod media_type;
pub(in crate::apps) mod path;
mod range;
mod root;
#[cfg(test)]
mod tests;
mod transfer;

use crate::apps::cgi::scripts::Place;
use crate::http::errors::{self, FILE_METHODS};
use crate::http::framing::{host_head, put_header, status_line};
use crate::http::request::{audience, split_target};
use crate::http::{Request, date};
use coding::Coding;
use conditional::{Conditions, Validators, Verdict};
use media_type::MediaType;
use range::Wanted;
use root::{Entry, File, Refusal, Root};
use std::io;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};
use transfer::Transfer;

/// The name of the file that a directory shows if its manifest names no other.
pub(crate) const DEFAULT_INDEX: &str = "index.html";

/// The page in the root that is sent with each 404, if it is there.
const NOT_FOUND_PAGE: &str = "404.html";

/// How a directory is served.
#[derive(Debug, Clone)]
pub(crate) struct SiteOptions {
    /// The directory, as an absolute path.
    pub(crate) root: PathBuf,
    /// Names of the files that a directory shows; the first that is there counts.
    pub(crate) index: Vec<String>,
    /// Whether an unknown path shows the index of the root to clients that prefer HTML.
    pub(crate) spa: bool,
    /// The `cache-control` of files.
    pub(crate) cache_control: Option<String>,
}

/// The worker on whose thread a site answers.
pub(crate) trait Caller {
    /// Does what the worker has to do while a long answer lasts, at least every [`transfer::CLIENT_TICK`]. True if the answer is to be cut.
    fn interrupts(&self) -> bool;

    /// Takes the line for the plugin's log about a request that the site failed. The client gets its answer after it.
    fn note_failed(&self, line: &str);
}

/// A directory that is served.
pub(crate) struct Site {
    root: Root,
    index: Vec<String>,
    spa: bool,
    cache_control: Option<String>,
    /// The beginning of a file.
    buffer: Vec<u8>,
}

/// What a path leads to.
enum Found {
    Page(Page),
    /// A directory that was asked for without the slash at its end.
    Directory,
    Missing,
}

/// A file, and its path below the root.
struct Page {
    file: File,
    path: Vec<u8>,
}

/// How a page is answered.
enum Plan {
    Send(File, Transfer),
    NotModified(Vec<u8>),
    PreconditionFailed,
    /// The length of the file, which does not have the range.
    Unsatisfiable(u64),
}

impl Site {
    /// Opens a directory.
    ///
    /// # Errors
    /// The root cannot be opened, or an option is not valid. The message is a sentence for people.
    pub(crate) fn open(options: &SiteOptions) -> io::Result<Self> {
        let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        if let Some(name) = options.index.iter().find(|name| !path::is_file_name(name)) {
            return invalid(format!("index names {name:?}, which is not the name of a file without a leading dot"));
        }
        if let Some(value) = options.cache_control.as_ref().filter(|value| !is_header_value(value)) {
            return invalid(format!("cache-control is {value:?}, which is not a value of that header: printable ASCII"));
        }
        Ok(Self {
            root: Root::open(&options.root)?,
            index: options.index.clone(),
            spa: options.spa,
            cache_control: options.cache_control.clone(),
            buffer: Vec::new(),
        })
    }

    /// Frees memory that an idle site does not need.
    pub(crate) fn release(&mut self) {
        self.buffer = Vec::new();
    }

    /// Follows a root that was replaced.
    pub(crate) fn refresh(&mut self) {
        self.root.refresh(Instant::now());
    }

    /// What is at a path below the root, for those who run scripts there.
    pub(crate) fn place(&self, path: &[u8]) -> Place {
        match self.root.find(path) {
            Ok(Entry::File(file)) => Place::File { executable: file.executable },
            Ok(Entry::Directory) => Place::Directory,
            Ok(Entry::Missing) => Place::Missing,
            Err(_) => Place::Refused,
        }
    }

    /// Answers a request.
    pub(crate) fn serve(&mut self, mut request: Request, caller: &dyn Caller) {
        match request.method_name() {
            "GET" | "HEAD" => {}
            "OPTIONS" => {
                let head = host_head(204, [("allow", FILE_METHODS)]);
                return request.responder.answer_whole(204, head, b"");
            }
            _ => return request.fail(errors::FILES_ARE_READ_ONLY),
        }
        self.refresh();
        let (path, query) = split_target(request.target());
        // The slash that is missing behind the route is that of a directory.
        let below = path.get(request.mount..).unwrap_or_default();
        let found = if below.is_empty() { Ok(Found::Directory) } else { self.find(below) };
        match found {
            Ok(Found::Page(page)) => self.send(request, page, false, caller),
            Ok(Found::Directory) => {
                let location = query.map_or_else(|| format!("{path}/"), |query| format!("{path}/?{query}"));
                // A redirect without this may be kept forever, and the directory become a file.
                let head = host_head(308, [("location", &*location), ("cache-control", "no-cache")]);
                request.responder.answer_whole(308, head, b"");
            }
            Ok(Found::Missing) => match self.fallback(&request) {
                Ok(Some(page)) => self.send(request, page, true, caller),
                Ok(None) => self.not_found(request, caller),
                Err(refusal) => self.refuse(request, &refusal, caller),
            },
            Err(refusal) => self.refuse(request, &refusal, caller),
        }
    }

    /// Finds what a path below the route leads to. A path that is never served is refused without a reason for the log.
    fn find(&self, below: &str) -> Result<Found, Refusal> {
        let Some(path) = path::resolve(below) else { return Err(Refusal::quiet(errors::NOT_FOUND)) };
        if path.is_directory {
            let page = self.find_index(path.bytes)?;
            return Ok(page.map_or(Found::Missing, Found::Page));
        }
        Ok(match self.root.find(&path.bytes)? {
            Entry::File(file) => Found::Page(Page { file, path: path.bytes }),
            Entry::Directory => Found::Directory,
            Entry::Missing => Found::Missing,
        })
    }

    /// The first index that a directory has.
    fn find_index(&self, mut path: Vec<u8>) -> Result<Option<Page>, Refusal> {
        if !path.is_empty() {
            path.push(b'/');
        }
        let directory = path.len();
        for name in &self.index {
            path.extend_from_slice(name.as_bytes());
            if let Entry::File(file) = self.root.find(&path)? {
                return Ok(Some(Page { file, path }));
            }
            path.truncate(directory);
        }
        Ok(None)
    }

    /// The page of a single-page application for a path that only its script knows.
    fn fallback(&self, request: &Request) -> Result<Option<Page>, Refusal> {
        if self.spa && audience(&request.head, None).html { self.find_index(Vec::new()) } else { Ok(None) }
    }

    /// Sends a page as the request asks for it. `negotiated` says that its `accept` has decided that it gets one.
    fn send(&mut self, mut request: Request, page: Page, negotiated: bool, caller: &dyn Caller) {
        match self.plan(&request, page, negotiated) {
            Plan::Send(file, transfer) => transfer.send(request, &file, &mut self.buffer, caller),
            Plan::NotModified(head) => {
                // A client that has left needs no answer.
                request.responder.begin(304, head, None, b"", true).ok();
            }
            Plan::PreconditionFailed => request.fail(errors::PRECONDITION_FAILED),
            Plan::Unsatisfiable(size) => {
                let id = request.id();
                let (mut head, body) = errors::render(errors::RANGE_NOT_SATISFIABLE, Some(audience(&request.head, Some(&id))));
                put_header(&mut head, "content-range", &format!("bytes */{size}"));
                request.responder.answer_whole(errors::RANGE_NOT_SATISFIABLE.status, head, body.as_bytes());
            }
        }
    }

    fn plan(&self, request: &Request, page: Page, negotiated: bool) -> Plan {
        let conditions = Conditions::of(&request.head);
        let MediaType { value: content_type, is_compressible } = media_type::of(&page.path);
        let (file, coding) = if is_compressible { self.encoded(page, &conditions) } else { (page.file, None) };
        let size = file.version.size;
        let validators = Validators::new(file.version, coding.map_or("", |coding| coding.name), SystemTime::now());
        let (status, wanted) = match conditions.evaluate(&validators) {
            Verdict::Failed => return Plan::PreconditionFailed,
            Verdict::NotModified => (304, Wanted::Whole),
            // Section 14.2 of RFC 9110: a range means something to GET only.
            Verdict::Send { range } => match conditions.range().filter(|_| range && !request.is_head()) {
                Some(value) => match range::wanted(value, size) {
                    Wanted::Whole => (200, Wanted::Whole),
                    Wanted::Unsatisfiable => return Plan::Unsatisfiable(size),
                    part @ Wanted::Part { .. } => (206, part),
                },
                None => (200, Wanted::Whole),
            },
        };
        let mut head = status_line(status);
        let mut put = |name: &str, value: &str| put_header(&mut head, name, value);
        if status != 304 {
            put("content-type", &content_type);
            put("x-content-type-options", "nosniff");
            put("accept-ranges", "bytes");
            if let Some(coding) = coding {
                put("content-encoding", coding.name);
            }
        }
        put("etag", &validators.etag());
        if let Some(date) = validators.last_modified() {
            put("last-modified", &date);
        }
        match (negotiated, is_compressible) {
            (true, true) => put("vary", "accept, accept-encoding"),
            (true, false) => put("vary", "accept"),
            (false, true) => put("vary", "accept-encoding"),
            (false, false) => {}
        }
        if let Some(value) = &self.cache_control {
            put("cache-control", value);
        }
        let (offset, length) = match wanted {
            Wanted::Part { first, last } => {
                put("content-range", &format!("bytes {first}-{last}/{size}"));
                (first, last - first + 1)
            }
            Wanted::Whole | Wanted::Unsatisfiable => (0, size),
        };
        date::put_line(&mut head);
        match status {
            304 => Plan::NotModified(head),
            _ => Plan::Send(file, Transfer { status, head, offset, length }),
        }
    }

    /// The file beside a page in the coding that the client prefers, if there is one that is not older; otherwise the page's own. One that
    /// cannot be served counts as missing.
    fn encoded(&self, page: Page, conditions: &Conditions<'_>) -> (File, Option<Coding>) {
        let Page { file, mut path } = page;
        let plain = path.len();
        for coding in conditions.accepted.preferred() {
            path.extend_from_slice(coding.suffix);
            if let Ok(Entry::File(encoded)) = self.root.find(&path)
                // Whole seconds: some compressors copy the plain file's time without the rest.
                && encoded.version.modified.0 >= file.version.modified.0
            {
                return (encoded, Some(coding));
            }
            path.truncate(plain);
        }
        (file, None)
    }

    /// Answers with the reason why a path is not served.
    fn refuse(&mut self, request: Request, refusal: &Refusal, caller: &dyn Caller) {
        if let Some(why) = &refusal.why {
            caller.note_failed(&format!("{}: {why}", request.name()));
        }
        if refusal.error == errors::NOT_FOUND {
            self.not_found(request, caller);
        } else {
            request.fail(refusal.error);
        }
    }

    /// Answers 404, with the site's own page if it has one.
    fn not_found(&mut self, request: Request, caller: &dyn Caller) {
        let Ok(Entry::File(file)) = self.root.find(NOT_FOUND_PAGE.as_bytes()) else { return request.fail(errors::NOT_FOUND) };
        let headers = [("content-type", media_type::HTML), ("x-content-type-options", "nosniff"), ("cache-control", "no-store")];
        let vary = self.spa.then_some(("vary", "accept"));
        let head = host_head(404, headers.into_iter().chain(vary));
        let transfer = Transfer { status: 404, head, offset: 0, length: file.version.size };
        transfer.send(request, &file, &mut self.buffer, caller);
    }
}

/// Whether a header may have this value: no line end, and nothing that a reader could take for one.
fn is_header_value(value: &str) -> bool {
    !value.trim().is_empty() && value.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}
