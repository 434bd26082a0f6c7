import ApertusKit
import Foundation

/// `apertus verify`: whether a folder is what its manifest says, and whether this program can run
/// it.
enum VerifyCommand {
    static let grammar = Grammar(
        command: "verify", words: "Check DIRECTORY: hashes, names, shapes, config and tokenizer.",
        operands: ["DIRECTORY"], options: [ModelOptions.json])

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) throws {
        guard let path = arguments.operands.first else {
            throw ApertusError(.usage, "DIRECTORY is missing; see `apertus verify --help`")
        }
        let result = try Verification(folder: URL(fileURLWithPath: path, isDirectory: true))
        if arguments.has("--json") {
            let findings = result.findings.map { finding in
                Report.object([
                    ("level", .text(finding.level.rawValue)), ("where", .text(finding.place)),
                    ("text", .text(finding.text)),
                ])
            }
            Sink.putLine(
                Report.object([
                    ("directory", .text(path)), ("ok", .flag(result.errors.isEmpty)),
                    ("files", .integer(result.files)), ("findings", .list(findings)),
                ]).written())
        } else {
            for finding in result.findings {
                Sink.put(
                    Sink.printable("\(finding.level): \(finding.place): \(finding.text)") + "\n")
            }
            if result.findings.isEmpty {
                Sink.put(
                    Sink.printable(
                        "\(path): \(counted(result.files, "file")), all as they should be") + "\n")
            }
        }
        if let first = result.errors.first {
            throw ApertusError(
                .rejected,
                "\(path): \(counted(result.errors.count, "problem")), first: \(first.place): "
                    + first.text
            )
        }
    }
}

/// `apertus selftest`: whether this machine computes what the folder says.
enum SelfTestCommand {
    static let grammar = Grammar(
        command: "selftest",
        words: "Compare tokenizer, chat format and arithmetic with the golden files of DIRECTORY.",
        operands: ["DIRECTORY"], options: ModelOptions.running + [ModelOptions.json])

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        guard let path = arguments.operands.first else {
            throw ApertusError(.usage, "DIRECTORY is missing; see `apertus selftest --help`")
        }
        let apertus = try await Apertus(
            folder: URL(fileURLWithPath: path, isDirectory: true),
            options: ModelOptions.load(arguments))
        let result = try await apertus.selfTest()
        if arguments.has("--json") {
            Sink.putLine(report(result, path).written())
        } else {
            Sink.put(
                "\(counted(result.texts, "text")), "
                    + "\(counted(result.conversations, "conversation")), "
                    + "\(counted(result.answers, "answer")) of "
                    + "\(counted(result.answerTokens, "token"))"
                    + (result.difference == nil ? ": all as they should be\n" : "\n"))
            if !result.coversArithmetic {
                Sink.note(
                    "the folder has no golden answers: apertus-mlx verify --golden writes them")
            }
        }
        if let difference = result.difference {
            throw ApertusError(.rejected, "\(path): \(difference)")
        }
    }

    private static func report(_ result: SelfTest, _ path: String) -> Report {
        let difference = result.difference.map { found in
            Report.object([
                ("part", .text(found.part.rawValue)), ("name", .text(found.name)),
                ("position", .integer(found.position)),
                ("expected", found.expected.map { .integer($0) } ?? .null),
                ("found", found.found.map { .integer($0) } ?? .null),
            ])
        }
        return .object([
            ("directory", .text(path)), ("ok", .flag(result.difference == nil)),
            ("texts", .integer(result.texts)), ("conversations", .integer(result.conversations)),
            ("answers", .integer(result.answers)), ("answer_tokens", .integer(result.answerTokens)),
            ("seconds", .number(result.seconds)), ("difference", difference ?? .null),
        ])
    }
}
