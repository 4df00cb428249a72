//! Draws QR codes as PNG or SVG.

use qrcode::canvas::{Canvas, MaskPattern};
use qrcode::render::{Renderer, svg};
use qrcode::{Color, EcLevel, bits, ec};
use service_kit::http::error::{Error, Result};

/// The width and height of one dot of a QR code, in pixels.
const DOT_PIXELS: usize = 6;
/// The width of the white border in dots; readers need four.
const QUIET_ZONE_DOTS: usize = 4;
/// The dots of a QR code, row by row, without the white around it.
pub(crate) struct QrCode {
    dots: Vec<Color>,
    width: usize,
}

impl QrCode {
    /// Makes the code as the library does, but with a fixed mask. The library compares all eight masks, which was most
    /// of the work: a third of a millisecond per ticket. No reader of today needs the best mask.
    pub(crate) fn of(content: &[u8]) -> qrcode::QrResult<Self> {
        let bits = bits::encode_auto(content, EcLevel::M)?;
        let version = bits.version();
        let (data, correction) = ec::construct_codewords(&bits.into_bytes(), version, EcLevel::M)?;
        let mut canvas = Canvas::new(version, EcLevel::M);
        canvas.draw_all_functional_patterns();
        canvas.draw_data(&data, &correction);
        canvas.apply_mask(MaskPattern::DiagonalLines);
        let dots = canvas.into_colors();
        Ok(Self { width: dots.len().isqrt(), dots })
    }

    /// The code as a PNG with one bit per pixel: about a kilobyte.
    pub(crate) fn png(&self) -> Result<Vec<u8>> {
        let Self { dots: colors, width: dots } = self;
        let dots = *dots;
        let side = (dots + 2 * QUIET_ZONE_DOTS) * DOT_PIXELS;
        let mut pixels = Vec::with_capacity(side.div_ceil(8) * side);
        for dot_row in 0..dots + 2 * QUIET_ZONE_DOTS {
            let mut line = vec![0xFF_u8; side.div_ceil(8)];
            if let Some(row) = dot_row.checked_sub(QUIET_ZONE_DOTS).filter(|row| *row < dots) {
                let dark = (0..dots).filter(|column| colors[row * dots + column] == Color::Dark);
                for x in dark.flat_map(|column| {
                    (0..DOT_PIXELS).map(move |pixel| (column + QUIET_ZONE_DOTS) * DOT_PIXELS + pixel)
                }) {
                    line[x / 8] &= !(0x80 >> (x % 8));
                }
            }
            (0..DOT_PIXELS).for_each(|_| pixels.extend_from_slice(&line));
        }
        let mut image = Vec::new();
        let mut encoder = png::Encoder::new(&mut image, side as u32, side as u32);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::One);
        // Twice the bytes of the best compression, in a tenth of its time. The best one took a seventh of this
        // service's work for a ticket.
        encoder.set_compression(png::Compression::Fastest);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
        written.map_err(|error| Error::Internal(error.into()))?;
        Ok(image)
    }

    /// The code as an SVG image.
    pub(crate) fn svg(&self) -> String {
        Renderer::<svg::Color<'_>>::new(&self.dots, self.width, QUIET_ZONE_DOTS as u32).build()
    }
}
