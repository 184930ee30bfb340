#include "tools/report_parts.h"

#include <fmt/format.h>

#include "tools/doctor.h"
#include "tools/report_charts.h"
#include "tools/report_page.h"
#include "tools/terminal.h"

namespace fourfold {
namespace {

constexpr size_t kLineBytes = 2000;  // of text that comes from files

std::string replaced(std::string text, std::string_view slot, std::string_view value) {
  const size_t at = text.find(slot);
  return at == std::string::npos ? text : text.replace(at, slot.size(), value);
}

}  // namespace

std::string html_text(std::string_view text) {
  std::string escaped;
  for (const char c : printable(text, kLineBytes)) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::string page(const std::string& title, const std::string& body) {
  // From the back, so that no slot is looked for in text that was put in.
  std::string text = replaced(std::string(kReportPage), "{{body}}", body);
  text = replaced(std::move(text), "{{style}}", kReportStyle);
  return replaced(std::move(text), "{{title}}", html_text(title));
}

std::string verdict_banner(bool is_fine, const std::string& verdict, const std::string& sentence) {
  return fmt::format("<div class=\"verdict{}\"><strong>{}</strong> <span>{}</span></div>\n",
                     is_fine ? "" : " bad", html_text(verdict), html_text(sentence));
}

std::string list_of(const std::vector<std::string>& lines) {
  std::string text = "<ul class=\"findings\">\n";
  for (const std::string& one : lines) text += "<li>" + html_text(one) + "</li>\n";
  return text + "</ul>\n";
}

std::string explanations_table(const std::vector<ReportedExplanation>& explanations, const char* heading) {
  if (explanations.empty()) return "";
  std::string text = fmt::format(
      "<{0}>Explanation</{0}>\n<div class=\"scroll\"><table><thead><tr><th scope=\"col\">rank</th><th "
      "scope=\"col\">distance</th><th class=\"text\" scope=\"col\">explanation</th></tr></thead><tbody>\n",
      heading);
  for (size_t i = 0; i < explanations.size(); ++i) {
    const ReportedExplanation& one = explanations[i];
    text +=
        fmt::format("<tr><td>{}</td><td>{:.3g}</td><td class=\"wide\"><strong>{}</strong><br>{}</td></tr>\n",
                    i + 1, one.distance, html_text(one.fault), html_text(one.evidence));
  }
  return text + "</tbody></table></div>\n";
}

std::string figure(const std::string& caption, const std::string& svg) {
  return "<figure><figcaption>" + html_text(caption) + "</figcaption>\n" + svg + "</figure>\n";
}

std::string distributions(const LayerCharts& drawn) {
  std::string text = "<div class=\"pair\">\n";
  if (!drawn.errors.empty()) {
    std::string exact;
    for (const Histogram& one : drawn.errors) {
      if (one.zeros > 0) exact += fmt::format("; {}: {} tokens exact", one.name, one.zeros);
      if (one.not_finite > 0)
        exact += fmt::format("; {}: {} tokens NaN or infinite", one.name, one.not_finite);
    }
    text += figure("Errors: tokens by the relative L2 of their output" + exact,
                   histogram_svg(drawn.errors, "tokens", "relative L2 of a token's output"));
  }
  if (!drawn.block_scales.empty()) {
    std::string rest;
    for (const Histogram& one : drawn.block_scales) {
      if (one.zeros > 0) rest += fmt::format("; {}: {} zero", one.name, one.zeros);
      if (one.not_finite > 0) rest += fmt::format("; {}: {} NaN or negative", one.name, one.not_finite);
    }
    text += figure("Block scales of the weights, as stored (e4m3)" + rest,
                   histogram_svg(drawn.block_scales, "blocks", "block scale, up to the next power of two"));
  }
  text += "</div>\n";
  return text;
}

std::string facts_list(const std::vector<std::pair<std::string, std::string>>& facts,
                       const std::vector<std::string>& notes) {
  std::string text = "<dl>\n";
  for (const auto& [label, fact] : facts) {
    text += "<dt>" + html_text(label) + "</dt><dd>" + html_text(fact) + "</dd>\n";
  }
  for (const std::string& note : notes) text += "<dt>note</dt><dd>" + html_text(note) + "</dd>\n";
  return text + "</dl>\n";
}

std::string machine_footer() {
  std::string text = "<footer><h2>Machine and versions</h2>\n<dl>\n";
  text += fmt::format("<dt>fourfold</dt><dd>{}</dd>\n", FOURFOLD_VERSION);
  for (const auto& [label, fact] : describe_machine()) {
    text += "<dt>" + html_text(label) + "</dt><dd>" + html_text(fact) + "</dd>\n";
  }
  return text + "</dl></footer>\n";
}

}  // namespace fourfold
