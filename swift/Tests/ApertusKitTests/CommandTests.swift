import ApertusKit
import Foundation
import Testing

#if os(macOS) || os(Linux)
    /// The command line, run as a shell runs it; keys and exit codes as Python's.
    @Suite(.serialized) struct CommandTests {
        private func run(
            _ arguments: String..., typed: String = ""
        ) throws -> (code: Int32, out: Data, err: String) {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = arguments
            let (given, out, err) = (Pipe(), Pipe(), Pipe())
            (process.standardOutput, process.standardError) = (out, err)
            process.standardInput = given
            try process.run()
            try given.fileHandleForWriting.write(contentsOf: Data(typed.utf8))
            try given.fileHandleForWriting.close()
            let data = out.fileHandleForReading.readDataToEndOfFile()
            let notes = err.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            return (process.terminationStatus, data, String(decoding: notes, as: UTF8.self))
        }

        /// Beside what runs the tests.
        private static var program: URL {
            get throws {
                var folder = URL(fileURLWithPath: CommandLine.arguments[0])
                while folder.path != "/" {
                    folder.deleteLastPathComponent()
                    let found = folder.appendingPathComponent("apertus")
                    if FileManager.default.isExecutableFile(atPath: found.path) { return found }
                }
                throw ApertusError(.notFound, "apertus is not beside the tests")
            }
        }

        private func keys(_ value: Any, _ prefix: String = "") -> Set<String> {
            guard let object = value as? [String: Any] else { return [] }
            return object.reduce(into: []) { found, member in
                found.insert(prefix + member.key)
                let first = (member.value as? [Any])?.first ?? member.value
                found.formUnion(keys(first, "\(prefix)\(member.key)."))
            }
        }

        @Test func generatePrintsPythonsKeysAndText() throws {
            let expected = try KitFixtures.expected
            let done = try run(
                "generate", "-m", try KitFixtures.model.path, "-n", "\(expected.tokens)", "-t", "0",
                "--json", expected.questions[1].prompt)
            #expect(done.code == 0)
            let object = try JSONSerialization.jsonObject(with: done.out)
            #expect(keys(object) == Set(expected.keys["generate"] ?? []))
            #expect((object as? [String: Any])?["text"] as? String == expected.questions[1].text)
            #expect(
                (object as? [String: Any])?["token_ids"] as? [Int]
                    == expected.questions[1].token_ids)
        }

        @Test func textGoesToStdoutAndTheRestToStderr() throws {
            let expected = try KitFixtures.expected
            let done = try run(
                "generate", "--model", try KitFixtures.model.path,
                "--max-tokens=\(expected.tokens)",
                "--temp", "0", expected.questions[1].prompt)
            #expect(String(decoding: done.out, as: UTF8.self) == expected.questions[1].text + "\n")
            #expect(done.err.contains("tokens/s"))
        }

        @Test func verifyPrintsPythonsKeys() throws {
            let done = try run("verify", try KitFixtures.model.path, "--json")
            #expect(done.code == 0)
            let object = try JSONSerialization.jsonObject(with: done.out)
            #expect(keys(object) == Set(try KitFixtures.expected.keys["verify"] ?? []))
        }

        /// But for those of Python's own packages and of what is not measured here.
        @Test func benchPrintsPythonsKeys() throws {
            let done = try run(
                "bench", try KitFixtures.model.path, "--json", "--rounds", "1", "--prompt-tokens", "",
                "--depths", "90", "--kv-bits", "4", "--new-tokens", "20")
            #expect(done.code == 0)
            let names = keys(try JSONSerialization.jsonObject(with: done.out))
            let absent: Set = [
                "apertus_mlx_version", "machine.identity.mlx", "machine.identity.package",
                "machine.python", "machine.metal", "machine.recommended_working_set_bytes",
                "machine.largest_buffer_bytes", "machine.mlx_variables", "machine.packages",
                "machine.mlx_library", "machine.mlx_wheels",
                "sides.ready.version", "sides.ready.kernels", "sides.start_s",
            ]
            let wantedNames = Set(try KitFixtures.expected.keys["bench"] ?? []).filter { key in
                !absent.contains(key) && !absent.contains { key.hasPrefix($0 + ".") }
            }
            #expect(names == wantedNames)
            let found = try JSON([UInt8](done.out))
            let wanted = try JSON([UInt8](
                Data(contentsOf: KitFixtures.folder.appendingPathComponent("bench.json"))))
            for key in ["parameters", "bits_per_weight", "weights_read_bytes", "context_tokens"] {
                #expect(found["model"]?[key]?.double == wanted["model"]?[key]?.double, "\(key)")
            }
            func kept(_ report: JSON) -> Double? {
                report["sides"]?.items?[0]["measurements"]?.items?[0]["kv_read_bytes"]?.double
            }
            #expect(kept(found) != nil && kept(found) == kept(wanted))
        }

        /// Lines of a script that Python's chat was given, too: what both write is the same.
        @Test func chatSaysWhatPythonSays() throws {
            let script = try JSON([UInt8](
                Data(contentsOf: KitFixtures.folder.appendingPathComponent("chat.json"))))
            let folder = FileManager.default.temporaryDirectory
                .appendingPathComponent("apertus-\(UUID().uuidString)").path
            try FileManager.default.createDirectory(
                atPath: folder, withIntermediateDirectories: true)
            defer { try? FileManager.default.removeItem(atPath: folder) }
            for file in script["files"]?.members ?? [] {
                let name = String(decoding: file.key, as: UTF8.self)
                try Data(file.value.written.utf8).write(
                    to: URL(fileURLWithPath: "\(folder)/\(name)"))
            }
            func here(_ text: String) -> String {
                text.replacingOccurrences(of: "FOLDER", with: folder)
            }
            let lines = (script["lines"]?.items ?? []).map { here($0.text ?? "") }
            let done = try run(
                "chat", "-m", try KitFixtures.model.path, "-t", "0", "-n", "6",
                typed: lines.joined(separator: "\n") + "\n")
            #expect(done.code == 0)
            #expect(String(decoding: done.out, as: UTF8.self) == here(script["out"]?.text ?? ""))
            // What a value is, each language says in its own words; Python tells of the machine, too.
            func told(_ text: String) -> [String] {
                text.split(separator: "\n").filter { !$0.hasPrefix("MLX has no GPU") }
                    .map { $0.components(separatedBy: ", not ")[0] }
            }
            #expect(told(done.err) == told(here(script["err"]?.text ?? "")))
            let saved = try JSON([UInt8](
                Data(contentsOf: URL(fileURLWithPath: "\(folder)/b.json"))))
            #expect(saved == script["saved"])
        }

        @Test func helpListsTheCommandsOfChat() throws {
            let done = try run("chat", "-m", try KitFixtures.model.path, typed: "/help\n")
            for line in try KitFixtures.expected.help { #expect(done.err.contains(line + "\n")) }
        }

        @Test func promptCachesAreMadeAndUsed() throws {
            let file = FileManager.default.temporaryDirectory
                .appendingPathComponent("apertus-\(UUID().uuidString)")
            defer { try? FileManager.default.removeItem(at: file) }
            let question = try KitFixtures.expected.questions[1]
            let common = ["-m", try KitFixtures.model.path, "-t", "0", "-n", "4", "--json"]
            func ask(_ prompt: String...) throws -> (code: Int32, values: JSON?) {
                let process = Process()
                process.executableURL = try Self.program
                process.arguments =
                    ["generate"] + common + ["--prompt-cache", file.path] + prompt
                let out = Pipe()
                (process.standardOutput, process.standardError) = (out, FileHandle.nullDevice)
                try process.run()
                let data = out.fileHandleForReading.readDataToEndOfFile()
                process.waitUntilExit()
                return (process.terminationStatus, try? JSON([UInt8](data)))
            }
            let (first, again) = (try ask(question.prompt), try ask(question.prompt))
            #expect(first.values?["reused_prompt_tokens"]?.int == 0)
            let count = try #require(first.values?["prompt_tokens"]?.int)
            #expect(again.values?["reused_prompt_tokens"]?.int == count - 1)
            for each in [first, again] {
                let ids = each.values?["token_ids"]?.items?.compactMap(\.int)
                #expect(ids == Array(question.token_ids.prefix(4)))
            }
            #expect(try ask("--raw", "Something else altogether").code == 3)
            try Data(contentsOf: file).dropLast().write(to: file)
            #expect(try ask(question.prompt).code == 3)
        }

        @Test func chatGoesOnFromAPromptCache() throws {
            let file = FileManager.default.temporaryDirectory
                .appendingPathComponent("apertus-\(UUID().uuidString)").path
            defer { try? FileManager.default.removeItem(atPath: file) }
            func talk() throws -> String {
                try run(
                    "chat", "-m", try KitFixtures.model.path, "-n", "2", "--prompt-cache", file,
                    typed: "What is a prompt?\n/stats\n"
                ).err
            }
            #expect(try !talk().contains("reused"))
            #expect(try talk().contains("reused)"))
        }

        @Test func aConversationMayComeInAFile() throws {
            let expected = try KitFixtures.expected.questions[1]
            let folder = FileManager.default.temporaryDirectory
                .appendingPathComponent("apertus-\(UUID().uuidString)")
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            defer { try? FileManager.default.removeItem(at: folder) }
            let messages = folder.appendingPathComponent("messages.json")
            let content = JSON.string(Array(expected.prompt.utf8)).written
            try Data(#"{"messages": [{"role": "user", "content": \#(content)}]}"#.utf8)
                .write(to: messages)
            let tools = folder.appendingPathComponent("tools.json")
            try Data(#"[{"name": "now", "description": "The time"}]"#.utf8).write(to: tools)
            let common = ["generate", "-m", try KitFixtures.model.path, "-t", "0", "-n", "3", "--json"]
            func values(_ arguments: [String]) throws -> JSON {
                let process = Process()
                process.executableURL = try Self.program
                process.arguments = common + arguments
                let out = Pipe()
                (process.standardOutput, process.standardError) = (out, FileHandle.nullDevice)
                try process.run()
                let data = out.fileHandleForReading.readDataToEndOfFile()
                process.waitUntilExit()
                return try JSON([UInt8](data))
            }
            let plain = try values(["--messages", messages.path])
            let ids = plain["token_ids"]?.items?.compactMap(\.int)
            #expect(ids == Array(expected.token_ids.prefix(3)))
            let given = try values(["--messages", messages.path, "--tools", tools.path])
            let (bare, declared) = (plain["prompt_token_ids"]?.items, given["prompt_token_ids"]?.items)
            let tool = try ToolDefinition.list(json: Data(contentsOf: tools))
            let opened = try ModelFolder(KitFixtures.model)
            let wanted = try opened.chatFormat().prompt([.user(expected.prompt)], tools: tool)
            #expect(declared?.compactMap(\.int) == wanted.map(Int.init) && declared != bare)
        }

        @Test func selftestSaysWhatItCompared() throws {
            let done = try run("selftest", try KitFixtures.model.path)
            #expect(done.code == 0)
            #expect(String(decoding: done.out, as: UTF8.self).contains("all as they should be"))
        }

        @Test(
            arguments: [
                (["generate", "--nonsense", "Hi"], 2), (["generate", "-n", "0", "Hi"], 2),
                (["generate", "-n", "3", "-n", "4", "Hi"], 2), (["generate", "a", "b"], 2),
                (["nonsense"], 2), (["generate", "-m", "/nowhere", "Hi"], 4), (["verify"], 2),
                (["verify", "/nowhere"], 4), (["generate", "Hi"], 2),
                (["generate", "--schema", "x", "Hi"], 2), (["generate", "--compute", "cpu", "Hi"], 2),
                (["chat", "--precision", "int8"], 2), (["chat", "--kv-sink", "3"], 2),
                (["generate", "--kv-rotate", "Hi"], 2), (["chat", "--output-filter", "x"], 2),
                (["generate", "--raw", "--tools", "x", "Hi"], 2),
                (["generate", "--messages", "/nowhere"], 4),
                (["generate", "--messages", "/dev/null"], 3), (["chat", "--tools", "/nowhere"], 4),
            ] as [([String], Int32)])
        func refusalsAreOneLine(_ words: [String], _ code: Int32) throws {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = words
            let err = Pipe()
            process.standardError = err
            process.standardInput = FileHandle.nullDevice
            try process.run()
            let notes = err.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            #expect(process.terminationStatus == code)
            let lines = String(decoding: notes, as: UTF8.self).split(separator: "\n")
            #expect(lines.count == 1 && lines[0].hasPrefix("error: "))
        }

        @Test func tooLittleMemoryIsFive() throws {
            let done = try run(
                "generate", "-m", try KitFixtures.model.path, "--memory-limit", "1MB", "Hi")
            #expect(done.code == 5)
        }

        @Test func anInterruptEndsTheAnswer() throws {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = [
                "generate", "-m", try KitFixtures.model.path, "-t", "0", "-n", "2000", "--raw",
                "The capital of France is",
            ]
            let (out, err) = (Pipe(), Pipe())
            (process.standardOutput, process.standardError) = (out, err)
            try process.run()
            let first = out.fileHandleForReading.availableData
            process.interrupt()
            let rest = out.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            #expect(process.terminationStatus == 130)
            #expect(String(decoding: first + rest, as: UTF8.self).hasSuffix("\n"))
        }
    }
#endif
