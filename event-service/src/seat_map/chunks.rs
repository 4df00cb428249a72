//! A long text in chunks, so that a change rebuilds only the chunk that has it. Each chunk is compressed and hashed
//! once, by itself.
//!
//! The gzip form is one stream. Every chunk is deflated on its own up to a byte boundary (a sync flush) and refers to
//! nothing before it, so chunks can be joined in any number. RFC 1952 asks for a header before them, and for an end,
//! the checksum and the length after them.

use std::sync::OnceLock;

use axum::body::Bytes;
use flate2::{Compress, Compression, FlushCompress};
use sha2::{Digest, Sha256};

/// Method deflate; no flags, time, level or operating system.
const GZIP_HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
/// An empty last block.
const DEFLATE_END: [u8; 2] = [3, 0];
/// Level 1 takes half the time of this one but makes 40 % more bytes (measured). The time is spent once, the bytes go
/// to every reader.
const LEVEL: Compression = Compression::new(2);
/// The most bytes that a flush adds, and that incompressible text grows by.
const DEFLATE_OVERHEAD: usize = 64;

/// One chunk. It never changes; a new one replaces it.
#[derive(Debug)]
pub(crate) struct Chunk {
    text: Vec<u8>,
    digest: [u8; 32],
    deflated: OnceLock<Deflated>,
}

#[derive(Debug)]
struct Deflated {
    bytes: Vec<u8>,
    checksum: crc32fast::Hasher,
}

impl Chunk {
    pub(crate) fn new(text: Vec<u8>) -> Self {
        Self { digest: Sha256::digest(&text).into(), text, deflated: OnceLock::new() }
    }

    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    fn deflated(&self) -> &Deflated {
        self.deflated.get_or_init(|| {
            let mut checksum = crc32fast::Hasher::new();
            checksum.update(&self.text);
            Deflated { bytes: deflate(&self.text), checksum }
        })
    }

    /// Compresses the chunk now instead of in [`gzip`]; `false` if it was compressed before.
    pub(crate) fn prepare(&self) -> bool {
        let new = self.deflated.get().is_none();
        self.deflated();
        new
    }
}

fn deflate(text: &[u8]) -> Vec<u8> {
    let mut deflate = Compress::new(LEVEL, false);
    let mut bytes = Vec::with_capacity(text.len() / 3 + DEFLATE_OVERHEAD);
    loop {
        let rest = &text[deflate.total_in() as usize..];
        // The only possible error is a stream that has ended already.
        let done = deflate.compress_vec(rest, &mut bytes, FlushCompress::Sync);
        debug_assert!(done.is_ok(), "{done:?}");
        if deflate.total_in() as usize == text.len() && bytes.len() < bytes.capacity() {
            bytes.shrink_to_fit();
            return bytes;
        }
        bytes.reserve(rest.len() / 3 + DEFLATE_OVERHEAD);
    }
}

/// The whole text.
pub(crate) fn plain(chunks: &[&Chunk]) -> Bytes {
    let mut bytes = Vec::with_capacity(chunks.iter().map(|chunk| chunk.text.len()).sum());
    chunks.iter().for_each(|chunk| bytes.extend_from_slice(&chunk.text));
    bytes.into()
}

/// The whole text as a gzip stream.
pub(crate) fn gzip(chunks: &[&Chunk]) -> Bytes {
    let size: usize = chunks.iter().map(|chunk| chunk.deflated().bytes.len()).sum();
    let mut bytes = Vec::with_capacity(size + GZIP_HEADER.len() + DEFLATE_END.len() + 8);
    let mut checksum = crc32fast::Hasher::new();
    let mut length = 0_u32;
    bytes.extend_from_slice(&GZIP_HEADER);
    for chunk in chunks {
        let deflated = chunk.deflated();
        bytes.extend_from_slice(&deflated.bytes);
        checksum.combine(&deflated.checksum);
        // Modulo 2³², as the standard says.
        length = length.wrapping_add(chunk.text.len() as u32);
    }
    bytes.extend_from_slice(&DEFLATE_END);
    bytes.extend_from_slice(&checksum.finalize().to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.into()
}

/// An ETag of the content: equal on every replica that cuts the same text into the same chunks.
pub(crate) fn tag(chunks: &[&Chunk]) -> String {
    let mut all = Sha256::new();
    chunks.iter().for_each(|chunk| all.update(chunk.digest));
    format!("\"{}\"", hex::encode(all.finalize()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn unzipped(bytes: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        // This decoder stops after the first stream, so text of a second stream would be missing.
        flate2::read::GzDecoder::new(bytes).read_to_end(&mut text).unwrap();
        text
    }

    proptest! {
        #[test]
        fn any_text_survives_chunking_and_gzip(texts in vec(vec(any::<u8>(), 0..3000), 0..8)) {
            let chunks: Vec<Chunk> = texts.iter().cloned().map(Chunk::new).collect();
            let chunks: Vec<&Chunk> = chunks.iter().collect();
            prop_assert_eq!(&plain(&chunks)[..], &texts.concat()[..]);
            prop_assert_eq!(unzipped(&gzip(&chunks)), texts.concat());
        }
    }

    #[test]
    fn a_text_larger_than_the_window_is_compressed() {
        let row = |seat: u32| format!("{{\"seat\":{seat},\"status\":\"available\"}},").into_bytes();
        let chunks: Vec<Chunk> =
            (0..100).map(|chunk| Chunk::new((chunk * 64..(chunk + 1) * 64).flat_map(row).collect())).collect();
        let chunks: Vec<&Chunk> = chunks.iter().collect();
        let (plain, packed) = (plain(&chunks), gzip(&chunks));
        assert!(plain.len() > 200_000 && packed.len() < plain.len() / 4, "{} of {}", packed.len(), plain.len());
        assert_eq!(unzipped(&packed), plain);
    }

    #[test]
    fn a_tag_depends_on_the_content_and_its_order() {
        let chunk = |text: &str| Chunk::new(text.into());
        assert_eq!(tag(&[&chunk("a"), &chunk("b")]), tag(&[&chunk("a"), &chunk("b")]));
        assert_ne!(tag(&[&chunk("a"), &chunk("b")]), tag(&[&chunk("b"), &chunk("a")]));
    }
}
