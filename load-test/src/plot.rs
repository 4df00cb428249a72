//! Line plots as SVG.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
/// The space for labels: left, top, right, bottom.
const MARGIN: [f64; 4] = [60.0, 10.0, 40.0, 30.0];
const COLOURS: [&str; 8] = ["#0b62a4", "#c1440e", "#3a7d34", "#7b3fa0", "#8a6d00", "#008080", "#b0306a", "#555555"];

/// An axis: how it places values, and where it has marks.
pub struct Axis {
    place: fn(f64) -> f64,
    marks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis from 0 to a round number.
    #[must_use]
    pub fn linear(max: f64) -> Self {
        let step = round_step(max / 5.0);
        let marks = (0..=(max / step).ceil() as usize).map(|index| index as f64 * step);
        Self { place: |value| value, marks: marks.map(|value| (value, value.to_string())).collect() }
    }

    /// An axis with powers of ten, in milliseconds.
    #[must_use]
    pub fn milliseconds(min: f64, max: f64) -> Self {
        let (from, to) = (min.max(0.001).log10().floor() as i32, max.max(0.01).log10().ceil() as i32);
        let marks = (from..=to.max(from + 1)).map(|power| 10_f64.powi(power));
        Self {
            place: |value| value.max(0.001).log10(),
            marks: marks.map(|value| (value, format!("{value} ms"))).collect(),
        }
    }

    /// An axis of percentiles. Each further nine takes as much space as the one before.
    #[must_use]
    pub fn percentiles() -> Self {
        let marks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
        Self {
            place: |percentile| -(1.0 - percentile / 100.0).max(1e-6).log10(),
            marks: marks.map(|percentile| (percentile, format!("{percentile} %"))).into(),
        }
    }

    /// Where a value lies on the axis, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let ends = self.marks.first().zip(self.marks.last());
        let Some(((min, _), (max, _))) = ends else { return 0.0 };
        let (min, max) = ((self.place)(*min), (self.place)(*max));
        ((self.place)(value) - min) / (max - min)
    }
}

/// 1, 2 or 5 times a power of ten, at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|round| *round >= step).unwrap_or(power * 10.0)
}

/// A named line of the plot.
pub struct Line {
    /// The line's name in the legend.
    pub name: String,
    /// The line's points, as x and y.
    pub points: Vec<(f64, f64)>,
}

/// Draws the lines as SVG, with a legend above.
#[must_use]
pub fn svg(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let [left, top, right, bottom] = MARGIN;
    let across = |value: f64| left + x.share(value) * (WIDTH - left - right);
    let down = |value: f64| HEIGHT - bottom - y.share(value) * (HEIGHT - top - bottom);
    let mut svg = format!("<figure><figcaption>{}", escape(title));
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let _ = write!(svg, " <span style=\"color:{colour}\">&#9644; {}</span>", escape(&line.name));
    }
    let _ = write!(svg, "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for (value, label) in &x.marks {
        let at = across(*value);
        let _ = write!(svg, "<path class=\"grid\" d=\"M{at:.1} {top}V{:.1}\"/>", HEIGHT - bottom);
        let _ = write!(svg, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>", HEIGHT - 10.0);
    }
    for (value, label) in &y.marks {
        let at = down(*value);
        let _ = write!(svg, "<path class=\"grid\" d=\"M{left} {at:.1}H{:.1}\"/>", WIDTH - right);
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", left - 6.0, at + 4.0);
    }
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<String> =
            line.points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), down(*y))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/>",
            points.join(" ")
        );
    }
    svg + "</svg></figure>\n"
}

/// Escapes text for HTML.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nine_takes_the_same_space() {
        let axis = Axis::percentiles();
        let (one, two, three) = (axis.share(90.0), axis.share(99.0), axis.share(99.9));
        assert!(((two - one) - (three - two)).abs() < 1e-9 && axis.share(0.0).abs() < 1e-9);
    }

    #[test]
    fn marks_are_round_and_reach_beyond_the_last_value() {
        let axis = Axis::linear(1234.0);
        assert_eq!(axis.marks.iter().map(|(value, _)| *value as u32).collect::<Vec<_>>(), [0, 500, 1000, 1500]);
        let axis = Axis::milliseconds(0.4, 35.0);
        assert_eq!(axis.marks.first().unwrap().1, "0.1 ms");
        assert_eq!(axis.marks.last().unwrap().1, "100 ms");
    }

    #[test]
    fn a_name_is_escaped_in_the_page() {
        let line = Line { name: "<script>".to_owned(), points: vec![(0.0, 1.0)] };
        let svg = svg("\"&", &Axis::percentiles(), &Axis::milliseconds(1.0, 10.0), &[line]);
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;") && svg.contains("&quot;&amp;"));
    }
}
