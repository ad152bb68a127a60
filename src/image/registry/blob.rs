//! A blob as a stream that survives cut connections.

use super::{
    client::{Attempts, Client, Failure},
    progress::Line,
};
use crate::{
    error::{Code, Error},
    image::Digest,
};
use std::{
    io::{self, Read},
    sync::{Mutex, PoisonError},
};
use ureq::{
    BodyReader,
    http::{StatusCode, header},
};

/// So many bytes of progress, and the attempts are counted afresh.
const PROGRESS: u64 = 256 << 10;

/// Reads a blob from its first byte to its last; where a connection ends early, the next one goes on from there.
pub struct Blob<'a> {
    client: &'a Client,
    digest: &'a Digest,
    size: u64,
    read: u64,
    /// Where the attempts were last counted from.
    counted: u64,
    attempts: Attempts,
    body: Option<BodyReader<'static>>,
    /// Why reading failed, since an [`io::Error`] has no room for it; where another blob failed, this one ends, too.
    failure: &'a Mutex<Option<Error>>,
    line: &'a Line,
}

impl<'a> Blob<'a> {
    /// Nothing is asked yet.
    pub fn new(
        client: &'a Client,
        digest: &'a Digest,
        size: u64,
        failure: &'a Mutex<Option<Error>>,
        line: &'a Line,
    ) -> Self {
        Self {
            client,
            digest,
            size,
            read: 0,
            counted: 0,
            attempts: Attempts::default(),
            body: None,
            failure,
            line,
        }
    }

    fn connect(&self) -> Result<BodyReader<'static>, Failure> {
        let response =
            self.client.get(&format!("blobs/{}", self.digest), self.read).map_err(|mut failure| {
                // A registry that restarts refuses connections for a while.
                failure.again |= self.read > 0 && failure.error.code() == Code::Registry;
                failure
            })?;
        let headers = response.headers();
        let number = |name, prefix: &str, end: char| {
            let value: &str = headers.get(name)?.to_str().ok()?;
            value.strip_prefix(prefix)?.split(end).next()?.parse::<u64>().ok()
        };
        let (length, start) =
            (number(header::CONTENT_LENGTH, "", ';'), number(header::CONTENT_RANGE, "bytes ", '-'));
        let start = if response.status() == StatusCode::PARTIAL_CONTENT { start } else { Some(0) };
        let wrong = |cause: String| {
            let what = "the registry sends something else than it promised";
            Failure { error: Error::new(Code::ImageBroken, what).cause(cause), again: false, pause: None }
        };
        let skip = start
            .and_then(|start| self.read.checked_sub(start))
            .ok_or_else(|| wrong(format!("bytes from {start:?} on instead of {}", self.read)))?;
        if let (Some(length), Some(start)) = (length, start)
            && start.saturating_add(length) != self.size
        {
            return Err(wrong(format!(
                "the blob {} has {} bytes, not {}",
                self.digest,
                start + length,
                self.size
            )));
        }
        let mut body = response.into_body().into_reader();
        // A registry that knows no ranges begins at the beginning.
        let skipped = io::copy(&mut (&mut body).take(skip), &mut io::sink());
        match skipped {
            Ok(count) if count == skip => Ok(body),
            Ok(_) => Err(self.client.cut("the stream ended")),
            Err(error) => Err(self.client.cut(error)),
        }
    }

    fn failed(&mut self, failure: Failure) -> io::Result<()> {
        self.body = None;
        if self.read - self.counted >= PROGRESS {
            (self.counted, self.attempts) = (self.read, Attempts::default());
        }
        self.attempts.after(failure).map_err(|error| {
            let error = error.context(format!("the layer {} cannot be fetched", self.digest));
            let text = error.what().to_owned();
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            io::Error::other(text)
        })
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let rest = usize::try_from(self.size - self.read).unwrap_or(usize::MAX).min(buffer.len());
            if rest == 0 {
                return Ok(0);
            }
            if let Some(error) = &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
                return Err(io::Error::other(error.what()));
            }
            let Some(body) = &mut self.body else {
                match self.connect() {
                    Ok(body) => self.body = Some(body),
                    Err(failure) => self.failed(failure)?,
                }
                continue;
            };
            match body.read(&mut buffer[..rest]) {
                Ok(0) => {
                    let failure = self.client.cut("the stream ended");
                    self.failed(failure)?;
                }
                Ok(count) => {
                    self.read += count as u64;
                    self.line.advance(count as u64);
                    return Ok(count);
                }
                Err(error) => {
                    let failure = self.client.cut(error);
                    self.failed(failure)?;
                }
            }
        }
    }
}
