// What layertest --candidate found, as a page.
#include <fmt/format.h>

#include "tools/candidate_test.h"
#include "tools/report_charts.h"
#include "tools/report_page.h"
#include "tools/report_parts.h"

namespace fourfold {
namespace {

std::string stage_table(const CandidateReport& report) {
  std::string text =
      "<div class=\"scroll\"><table><thead><tr><th class=\"text\" scope=\"col\">stage</th><th "
      "scope=\"col\">distance</th><th scope=\"col\">limit</th></tr></thead><tbody>\n";
  for (const CandidateStage& stage : report.stages) {
    text += fmt::format("<tr{}><td class=\"text\">{}</td><td>{:.3e}</td><td>{:.1e}</td></tr>\n",
                        stage.is_off() ? " class=\"bad\"" : "", html_text(stage.name), stage.distance,
                        stage.limit);
  }
  return text +
         "</tbody></table></div>\n<p class=\"quiet\">Each stage beside what is due after the engine's own "
         "stage "
         "before it. The limit is what rounding may do.</p>\n";
}

std::string scatters(const CandidateReport& report) {
  if (!report.charts.worst_token) return "";
  const TokenScatter& worst = *report.charts.worst_token;
  std::string text = "<h2>The worst token</h2>\n<div class=\"pair\">\n";
  text +=
      figure(fmt::format("Token {}: candidate against the layer as it should be; on the diagonal both agree",
                         worst.token),
             scatter_svg(worst));
  if (report.explained_token) {
    text +=
        figure("The same token against the layer with the fault in it", scatter_svg(*report.explained_token));
  }
  return text + "</div>\n";
}

std::string routing(const CandidateReport& report) {
  if (!report.routing) return report.routing_left_out;
  const diagnosis::RoutingDiagnosis& found = *report.routing;
  std::string text = fmt::format(
      "The engine's routing weights are {:.2e} from the router's in the median token; {} tokens go to "
      "other experts.",
      found.distance, found.tokens_with_other_ids);
  if (found.best)
    text +=
        fmt::format(" {}: {} ({:.2e} from them).", found.best->id, found.best->sentence, found.best_distance);
  return text;
}

}  // namespace

std::string candidate_html(const CandidateReport& report) {
  const bool is_fine = report.verdict == "fine";
  const std::string title = fmt::format("layertest: an engine's {}, layer {}", report.model, report.layer);
  std::string body = fmt::format("<h1>{}</h1>\n", html_text(title));
  body += verdict_banner(is_fine, report.verdict, report.explanation);
  if (!report.remedy.empty()) body += "<p>Look at: " + html_text(report.remedy) + "</p>\n";
  body += explanations_table(report.explanations, "h2");
  body += "<h2>Routing</h2>\n<p>" + html_text(routing(report)) + "</p>\n";
  body += "<h2>Stage by stage</h2>\n" + stage_table(report);
  if (!is_fine)
    body += "<h2>Where the error sits</h2>\n" + list_of(describe(report.map, report.mapped_tokens));
  body += scatters(report);
  body += "<h2>Distributions</h2>\n" + distributions(report.charts);
  body += "<h2>What was tested</h2>\n" + facts_list(report.facts, report.notes);
  return page(title, body + machine_footer());
}

}  // namespace fourfold
